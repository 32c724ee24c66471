//! [`Setting`]: a key of config.json, or a size that config.json does not have, and where its value is read from the
//! tensors.

use crate::error::{LayoutError, Result};
use crate::manifest::config_values::ConfigValues;
use crate::manifest::evidence::{TensorsByName, block_count, block_numbers, vote};
use crate::manifest::one_or_many::OneOrMany;
use crate::manifest::pattern::Pattern;
use crate::manifest::per_block::PerBlockList;
use crate::manifest::shape::SizeExpr;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// The most blocks that a config.json may declare. Real models have fewer than a hundred; every block is expanded into
/// a list of its tensors, so a hostile number would fill the memory.
const MOST_BLOCKS: u64 = 10_000;
/// The largest size that may be declared without a tensor to check it. Real ones stay below 200 000; their products are
/// computed, and must not overflow.
const MOST_SIZE: u64 = 1_000_000;
/// Characters of an invalid value that an error shows.
const MOST_SHOWN: usize = 80;

/// A setting in a manifest. It has at most one of `value`, `blocks`, `numbers`, `list`, `present`, `extent` and `size`.
/// A number read from the tensors is then divided by `over`, its square root is taken if `root`, it is multiplied by
/// `times`, `plus` is added (which may be negative), and it is limited to `most`, in this order. If any step does not
/// give a whole number, nothing is found.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setting {
    pub key: String,
    /// Whether it is only used in the manifest and not part of config.json.
    #[serde(default)]
    pub hidden: bool,
    /// The key of config.json that declares it, if that is another.
    declared: Option<String>,
    /// The value in every model of the family.
    value: Option<Value>,
    /// Prefixes of tensor names: the value is the number of blocks in them.
    pub blocks: Option<OneOrMany>,
    /// A prefix of tensor names: the value is the list of block numbers in them.
    pub numbers: Option<String>,
    /// An entry for each block.
    pub list: Option<PerBlockList>,
    /// A tensor: the value is whether the file has it.
    present: Option<String>,
    /// The values of `present` in place of true and false; `no` is null by default if there is a `yes`.
    yes: Option<Value>,
    no: Option<Value>,
    /// Dimensions, as [tensor, axis]: the value is the size that most of them have. A negative axis counts from the
    /// end.
    #[serde(default)]
    extent: Vec<(String, isize)>,
    /// A product of earlier settings.
    size: Option<SizeExpr>,
    over: Option<SizeExpr>,
    #[serde(default)]
    root: bool,
    times: Option<SizeExpr>,
    #[serde(default)]
    plus: isize,
    most: Option<usize>,
    /// The values of the published models, which are assumed if nothing else states the value.
    #[serde(default)]
    published: Vec<PublishedValue>,
    /// Whether it is any real number, not a size.
    #[serde(default)]
    real: bool,
    /// Whether it may stay null if nothing states it and no published model fits.
    #[serde(default)]
    pub optional: bool,
    /// A setting that the entries of the value must add up to.
    pub sum: Option<String>,
    /// Why nothing can be assumed, for the error.
    why: Option<String>,
}

/// A value, and the values of earlier settings for which it holds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct PublishedValue {
    value: Value,
    #[serde(default)]
    when: Map<String, Value>,
}

impl Setting {
    /// The key of config.json that declares it.
    pub fn declared_as(&self) -> &str {
        self.declared.as_ref().unwrap_or(&self.key)
    }

    /// Whether it is a list of block numbers.
    pub fn lists_blocks(&self) -> bool {
        self.numbers.is_some() || self.list.as_ref().is_some_and(PerBlockList::lists_block_numbers)
    }

    /// The value that the tensors show, and where.
    pub fn find(&self, tensors: &TensorsByName, sizes: &ConfigValues) -> Option<(Value, String)> {
        if let Some(value) = &self.value {
            return Some((value.clone(), "the family".to_owned()));
        }
        if let Some(prefixes) = self.blocks.as_ref().map(OneOrMany::all) {
            let all = prefixes.iter().flat_map(|prefix| block_numbers(prefix, tensors)).collect();
            return Some((block_count(&all).into(), format!("the numbers of {:?}", prefixes.join(" and "))));
        }
        if let Some(list) = &self.list {
            return list.find(tensors, sizes).map(|(list, witness)| (list.into(), witness));
        }
        if let Some(prefix) = &self.numbers {
            let numbers: Vec<usize> = block_numbers(prefix, tensors).into_iter().collect();
            return Some((numbers.into(), format!("the numbers of {prefix:?}")));
        }
        if let Some(name) = &self.present {
            return Some((self.presence(name, tensors), format!("the tensor {name:?}")));
        }
        let (number, witness) = self.number(tensors, sizes)?;
        Some((self.derive(number, sizes)?.into(), witness))
    }

    fn presence(&self, name: &str, tensors: &TensorsByName) -> Value {
        let pattern = Pattern::new(name);
        let is_present = tensors.keys().any(|name| pattern.captures(name).is_some());
        match &self.yes {
            Some(yes) if is_present => yes.clone(),
            Some(_) => self.no.clone().unwrap_or_default(),
            None => is_present.into(),
        }
    }

    fn number(&self, tensors: &TensorsByName, sizes: &ConfigValues) -> Option<(usize, String)> {
        let Some(size) = &self.size else { return self.vote(tensors) };
        let over = self.over.as_ref().map(|over| format!(" / {over}"));
        Some((size.value(sizes)?, format!("{size}{}", over.unwrap_or_default())))
    }

    /// The size that most of the dimensions in `extent` have.
    fn vote(&self, tensors: &TensorsByName) -> Option<(usize, String)> {
        let mut votes: Vec<(usize, &str)> = Vec::new();
        for (tensor, axis) in &self.extent {
            let pattern = Pattern::new(tensor);
            // A name without a block number is looked up; only the others need a search of all names.
            let range = if pattern.is_numbered() {
                tensors.range::<String, _>(..)
            } else {
                tensors.range(tensor.clone()..=tensor.clone())
            };
            let voters = range.filter(|(name, _)| pattern.captures(name).is_some());
            votes.extend(voters.filter_map(|(name, tensor)| Some((extent(&tensor.shape, *axis)?, name.as_str()))));
        }
        vote(votes).map(|(value, name)| (value, format!("the shape of {name:?}")))
    }

    /// The value after `over`, `root`, `times`, `plus` and `most`; `None` if it is not a whole number.
    fn derive(&self, number: usize, sizes: &ConfigValues) -> Option<usize> {
        let factor = |size: &Option<SizeExpr>| size.as_ref().map_or(Some(1), |size| size.value(sizes));
        let over = factor(&self.over).filter(|over| *over > 0 && number.is_multiple_of(*over))?;
        let quotient = number / over;
        let root = if self.root { quotient.isqrt() } else { quotient };
        let is_whole = !self.root || root * root == quotient;
        let number = is_whole.then_some(root)?.checked_mul(factor(&self.times)?)?.checked_add_signed(self.plus)?;
        Some(self.most.map_or(number, |most| number.min(most)))
    }

    /// The value in the published models with these `sizes`. `remedy` is what the error advises.
    ///
    /// # Errors
    /// [`LayoutError::Ambiguous`] if no published model has these sizes.
    pub fn published(&self, sizes: &ConfigValues, remedy: &str) -> Result<Value> {
        match self.published.iter().find(|published| sizes.satisfies(&published.when)) {
            Some(published) => Ok(published.value.clone()),
            None => {
                let why = self.why.as_ref().map(|why| format!("; {why}")).unwrap_or_default();
                Err(self.ambiguous(format!("{}{why}; {remedy}", self.why_unknown())))
            }
        }
    }

    fn why_unknown(&self) -> String {
        let tensors: BTreeSet<&String> = self.extent.iter().map(|(tensor, _)| tensor).collect();
        let describe = |one: &PublishedValue| format!("{} for {}", one.value, Value::from(one.when.clone()));
        let published: Vec<String> = self.published.iter().map(describe).collect();
        if !published.is_empty() {
            format!("published models have {} only", published.join(", "))
        } else if tensors.is_empty() {
            "no tensor shows it".to_owned()
        } else {
            let tensors: Vec<&String> = tensors.into_iter().collect();
            format!("the tensors {tensors:?} are missing or do not give a whole number")
        }
    }

    fn ambiguous(&self, reason: String) -> LayoutError {
        LayoutError::Ambiguous { what: format!("{:?}", self.key), reason }
    }

    /// Checks a declared value. `found` is what the tensors show.
    ///
    /// # Errors
    /// [`LayoutError::Ambiguous`] if the value is invalid.
    pub fn check_declared(&self, declared: &Value, found: Option<&Value>, origin: &str) -> Result<()> {
        match self.expectation(declared, found) {
            None => Ok(()),
            Some(expected) => {
                let declared: String = declared.to_string().chars().take(MOST_SHOWN).collect();
                Err(self.ambiguous(format!("{origin} declares {declared}, expected {expected}; fix it")))
            }
        }
    }

    /// What a declared value should be, if it is not. Numbers and lists of blocks come first: they are limited even if
    /// the tensors show the value, because the declared one is used and would be expanded. Any other value that the
    /// tensors show needs no check here: a wrong one is reported as a conflict. Of values that no tensor shows only the
    /// type can be checked; it is that of the published values, where a whole number stands for a size.
    fn expectation(&self, declared: &Value, found: Option<&Value>) -> Option<String> {
        if self.blocks.is_some() {
            return whole_number(declared, MOST_BLOCKS);
        }
        if self.numbers.is_some() || self.list.is_some() {
            return short_list(declared);
        }
        if found.is_some() {
            return None;
        }
        match self.published.first().map(|published| &published.value) {
            _ if self.real => finite(declared),
            Some(Value::Array(_)) => None,
            Some(Value::String(_)) => (!declared.is_string()).then(|| "a string".to_owned()),
            Some(Value::Bool(_)) => (!declared.is_boolean()).then(|| "true or false".to_owned()),
            Some(Value::Number(number)) if number.is_f64() => positive(declared),
            None if self.optional => positive(declared),
            _ => whole_number(declared, MOST_SIZE),
        }
    }
}

// Each of these returns what was expected of `declared`, if it is something else.

fn whole_number(declared: &Value, most: u64) -> Option<String> {
    declared.as_u64().is_none_or(|number| number > most).then(|| format!("a number up to {most}"))
}

fn short_list(declared: &Value) -> Option<String> {
    let is_long = declared.as_array().is_some_and(|list| list.len() as u64 > MOST_BLOCKS);
    is_long.then(|| format!("at most {MOST_BLOCKS} numbers"))
}

fn finite(declared: &Value) -> Option<String> {
    declared.as_f64().is_none_or(|number| !number.is_finite()).then(|| "a number".to_owned())
}

fn positive(declared: &Value) -> Option<String> {
    let is_positive = declared.as_f64().is_some_and(|number| number > 0.0 && number.is_finite());
    (!is_positive).then(|| "a number above 0".to_owned())
}
/// The size of a dimension; a negative `axis` counts from the last.
fn extent(shape: &[usize], axis: isize) -> Option<usize> {
    let axis = if axis < 0 { shape.len().checked_add_signed(axis) } else { usize::try_from(axis).ok() };
    shape.get(axis?).copied()
}
