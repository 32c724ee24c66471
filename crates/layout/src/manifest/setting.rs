//! [`Setting`]: a key of config.json or a hidden size, and where a manifest says that its value is read.

use crate::error::{LayoutError, Result};
use crate::manifest::config_values::ConfigValues;
use crate::manifest::evidence::{TensorsByName, count, numbers, vote};
use crate::manifest::one_or_many::OneOrMany;
use crate::manifest::pattern::Pattern;
use crate::manifest::per_block::PerBlockList;
use crate::manifest::shape::Extent;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// More blocks than any model has; a config.json that declares more is not believed.
const MOST_BLOCKS: u64 = 10_000;
/// More than any size that no tensor shows.
const MOST_SIZE: u64 = 1_000_000;

/// Of a declared value that is not believed so many characters are shown.
const MOST_SHOWN: usize = 80;

/// A setting as a manifest gives it. Of `value`, `blocks`, `numbers`, `list`, `present`, `extent` and `size` it has one
/// at most. A number that is found is worked on in this order: divided by `over`, its root taken, multiplied by `times`,
/// `plus` added (it may be below 0), and no more than `most` left; where that leaves the whole numbers, nothing is
/// found.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setting {
    pub key: String,
    /// Whether config.json does not have it.
    #[serde(default)]
    pub hidden: bool,
    /// The value that every model of the family has.
    value: Option<Value>,
    /// Prefixes of tensor names whose numbers are counted, together if there are several.
    pub blocks: Option<OneOrMany>,
    /// A prefix of tensor names whose numbers are listed.
    pub numbers: Option<String>,
    /// An entry for each block.
    pub list: Option<PerBlockList>,
    /// A tensor that makes it true by being there, and false by not being there.
    present: Option<String>,
    /// What stands in place of true; null then stands in place of false, if nothing else does.
    yes: Option<Value>,
    no: Option<Value>,
    /// Extents, as [tensor, axis]: the one that most of them have.
    #[serde(default)]
    extent: Vec<(String, usize)>,
    /// A product of earlier sizes.
    size: Option<Extent>,
    over: Option<Extent>,
    #[serde(default)]
    root: bool,
    times: Option<Extent>,
    #[serde(default)]
    plus: isize,
    most: Option<usize>,
    /// What the published models have, where nothing else tells it.
    #[serde(default)]
    published: Vec<PublishedValue>,
    /// Whether it is any real number, and not a size.
    #[serde(default)]
    real: bool,
    /// Whether it may stay null where nothing tells it and no published model is like this one.
    #[serde(default)]
    pub optional: bool,
    /// A size that the numbers of the value must add up to.
    pub sum: Option<String>,
    /// Why nothing may be taken for granted, for the error that asks for it.
    why: Option<String>,
}

/// A value, and what earlier settings must be for it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct PublishedValue {
    value: Value,
    #[serde(default)]
    when: Map<String, Value>,
}

impl Setting {
    /// Whether it is a list of block numbers.
    pub fn lists_blocks(&self) -> bool {
        self.numbers.is_some() || self.list.as_ref().is_some_and(PerBlockList::names_blocks)
    }

    /// The value as the tensors show it, and which tensor does.
    pub fn find(&self, tensors: &TensorsByName, sizes: &ConfigValues) -> Option<(Value, String)> {
        if let Some(value) = &self.value {
            return Some((value.clone(), "the family".to_owned()));
        }
        if let Some(prefixes) = self.blocks.as_ref().map(OneOrMany::all) {
            let all = prefixes.iter().flat_map(|prefix| numbers(prefix, tensors)).collect();
            return Some((count(&all).into(), format!("the numbers of {:?}", prefixes.join(" and "))));
        }
        if let Some(list) = &self.list {
            return list.find(tensors, sizes).map(|(list, witness)| (list.into(), witness));
        }
        if let Some(prefix) = &self.numbers {
            let numbers: Vec<usize> = numbers(prefix, tensors).into_iter().collect();
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
        match (tensors.keys().any(|name| pattern.captures(name).is_some()), &self.yes) {
            (true, Some(yes)) => yes.clone(),
            (false, Some(_)) => self.no.clone().unwrap_or_default(),
            (there, None) => there.into(),
        }
    }

    fn number(&self, tensors: &TensorsByName, sizes: &ConfigValues) -> Option<(usize, String)> {
        let Some(size) = &self.size else { return self.vote(tensors) };
        let over = self.over.as_ref().map(|over| format!(" / {over}"));
        Some((size.value(sizes)?, format!("{size}{}", over.unwrap_or_default())))
    }

    /// The extent that most of the places have; one misshapen tensor must not decide.
    fn vote(&self, tensors: &TensorsByName) -> Option<(usize, String)> {
        let mut votes: Vec<(usize, &str)> = Vec::new();
        for (place, axis) in &self.extent {
            let pattern = Pattern::new(place);
            let range = if pattern.is_numbered() {
                tensors.range::<String, _>(..)
            } else {
                tensors.range(place.clone()..=place.clone())
            };
            let voters = range.filter(|(name, _)| pattern.captures(name).is_some());
            votes.extend(voters.filter_map(|(name, tensor)| Some((*tensor.shape.get(*axis)?, name.as_str()))));
        }
        vote(votes).map(|(value, name)| (value, format!("the shape of {name:?}")))
    }

    fn derive(&self, number: usize, sizes: &ConfigValues) -> Option<usize> {
        let factor = |extent: &Option<Extent>| extent.as_ref().map_or(Some(1), |extent| extent.value(sizes));
        let over = factor(&self.over).filter(|over| *over > 0 && number.is_multiple_of(*over))?;
        let quotient = number / over;
        let root = if self.root { quotient.isqrt() } else { quotient };
        let whole = !self.root || root * root == quotient;
        let number = whole.then_some(root)?.checked_mul(factor(&self.times)?)?.checked_add_signed(self.plus)?;
        Some(self.most.map_or(number, |most| number.min(most)))
    }

    /// The value of the published models of `sizes`; `remedy` is what to do where there is none.
    ///
    /// # Errors
    /// [`LayoutError::Ambiguous`] where there is none.
    pub fn published(&self, sizes: &ConfigValues, remedy: &str) -> Result<Value> {
        if let Some(one) = self.published.iter().find(|one| sizes.satisfy(&one.when)) {
            return Ok(one.value.clone());
        }
        let places: BTreeSet<&String> = self.extent.iter().map(|(place, _)| place).collect();
        let places: Vec<&String> = places.into_iter().collect();
        let published =
            self.published.iter().map(|one| format!("{} holds for {}", one.value, Value::from(one.when.clone())));
        let published: Vec<String> = published.collect();
        let reason = match (&published[..], &places[..]) {
            ([], []) => "no tensor shows it".to_owned(),
            ([], places) => format!("what would show it is missing or no whole number (tensors {places:?})"),
            (published, _) => format!("of the published values {} alone", published.join(", ")),
        };
        let why = self.why.as_ref().map(|why| format!("; {why}")).unwrap_or_default();
        Err(self.ambiguous(format!("{reason}{why}; {remedy}")))
    }

    fn ambiguous(&self, reason: String) -> LayoutError {
        LayoutError::Ambiguous { what: format!("{:?}", self.key), reason }
    }

    /// Whether `declared` can be, as far as nothing will be held against it.
    ///
    /// # Errors
    /// [`LayoutError::Ambiguous`] where it cannot.
    pub fn believable(&self, declared: &Value, found: Option<&Value>, origin: &str) -> Result<()> {
        let expected = match (&self.blocks, found) {
            (Some(_), _) => whole_number(declared, MOST_BLOCKS),
            _ if self.numbers.is_some() || self.list.is_some() => short_list(declared),
            (None, Some(_)) => None,
            (None, None) => match self.published.first().map(|one| &one.value) {
                _ if self.real => finite(declared),
                Some(Value::Array(_)) => None,
                Some(Value::String(_)) => (!declared.is_string()).then(|| "a word".to_owned()),
                Some(Value::Bool(_)) => (!declared.is_boolean()).then(|| "true or false".to_owned()),
                Some(Value::Number(number)) if number.is_f64() => positive(declared),
                None if self.optional => positive(declared),
                _ => whole_number(declared, MOST_SIZE),
            },
        };
        match expected {
            None => Ok(()),
            Some(expected) => {
                let declared: String = declared.to_string().chars().take(MOST_SHOWN).collect();
                Err(self.ambiguous(format!("{origin} declares {declared}, expected {expected}; mend it")))
            }
        }
    }
}

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
    let is = declared.as_f64().is_some_and(|number| number > 0.0 && number.is_finite());
    (!is).then(|| "a number above 0".to_owned())
}
