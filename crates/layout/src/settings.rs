//! [`Setting`]: a key of config.json and where its value is read; [`Sizes`]: the values found.
//!
//! What config.json declares counts; what the tensors show is held against it.

use crate::account::Contradiction;
use crate::assembly::Assembly;
use crate::error::{LayoutError, Result};
use crate::pattern::Pattern;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// More blocks than any model has; a config.json that declares more is not believed.
const MOST_BLOCKS: u64 = 10_000;

/// A key of config.json, or a hidden size, as a manifest gives it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setting {
    pub key: String,
    /// Whether config.json does not have it.
    #[serde(default)]
    pub hidden: bool,
    /// A prefix of tensor names whose numbers are counted.
    pub blocks: Option<String>,
    value: Option<Value>,
    #[serde(default)]
    extent: Vec<(String, usize)>,
    quotient: Option<(String, String)>,
    present: Option<String>,
    /// The value of the published models, taken where the settings are as `when` says.
    published: Option<Value>,
    #[serde(default)]
    when: Map<String, Value>,
    /// A size that the numbers of the value must add up to.
    sum: Option<String>,
}

/// Values of settings, hidden ones too.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sizes(BTreeMap<String, Value>);

impl Sizes {
    pub fn number(&self, key: &str) -> Option<usize> {
        self.0.get(key)?.as_u64().and_then(|number| usize::try_from(number).ok())
    }

    pub fn flag(&self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Whether every key has the value that `conditions` give it.
    pub fn satisfy(&self, conditions: &Map<String, Value>) -> bool {
        conditions.iter().all(|(key, value)| self.0.get(key).is_some_and(|found| same(found, value)))
    }
}

/// What is said of the settings outside the tensors.
#[derive(Clone, Copy)]
pub(crate) struct Declared<'a> {
    pub config: Option<&'a Value>,
    pub metadata: &'a BTreeMap<String, String>,
}

impl Declared<'_> {
    /// The declared value of `key` and who declares it; null counts as not declared.
    pub fn get(&self, key: &str) -> Option<(Value, &'static str)> {
        let of_config = || Some((self.config?.get(key)?.clone(), "config.json"));
        let of_metadata = || {
            let whole = self.metadata.get("config").and_then(|text| serde_json::from_str::<Value>(text).ok());
            let one = || serde_json::from_str(self.metadata.get(key)?).ok();
            Some((whole.and_then(|config| config.get(key).cloned()).or_else(one)?, "the file's metadata"))
        };
        of_config().filter(|(value, _)| !value.is_null()).or_else(of_metadata).filter(|(value, _)| !value.is_null())
    }
}

/// All settings of a model, and how they were found.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    pub sizes: Sizes,
    pub config: Map<String, Value>,
    pub evidence: Vec<String>,
    pub notes: Vec<String>,
    pub contradictions: Vec<Contradiction>,
}

type Tensors = BTreeMap<String, Assembly>;

impl Settled {
    /// Settles `settings` in order, so that later ones may use earlier ones.
    pub fn new(settings: &[Setting], tensors: &Tensors, declared: Declared) -> Result<Self> {
        let mut settled = Self::default();
        for setting in settings {
            settled.settle(setting, tensors, declared)?;
        }
        Ok(settled)
    }

    fn settle(&mut self, setting: &Setting, tensors: &Tensors, declared: Declared) -> Result<()> {
        let found = setting.find(tensors, &self.sizes);
        let value = match (declared.get(&setting.key), found) {
            (Some((declared, origin)), found) => {
                setting.believable(&declared, origin)?;
                if let Some((found, witness)) = found.filter(|(found, _)| !same(found, &declared)) {
                    self.disagree(setting, (&declared, origin), (found, witness));
                }
                declared
            }
            (None, Some((found, witness))) => {
                self.evidence.push(format!("{} {found} from {witness}", setting.key));
                found
            }
            (None, None) => {
                let value = setting.published(&self.sizes)?;
                self.notes.push(format!("{} {value} is that of the published models", setting.key));
                value
            }
        };
        self.check_sum(setting, &value);
        if !setting.hidden {
            self.config.insert(setting.key.clone(), value.clone());
        }
        self.sizes.0.insert(setting.key.clone(), value);
        Ok(())
    }

    /// Another number of blocks is not contradicted here: it shows in the names of missing or unmatched tensors.
    fn disagree(&mut self, setting: &Setting, declared: (&Value, &str), found: (Value, String)) {
        let contradiction = Contradiction {
            key: setting.key.clone(),
            declared: declared.0.clone(),
            origin: declared.1.to_owned(),
            found: found.0,
            witness: found.1,
        };
        match setting.blocks {
            Some(_) => self.notes.push(contradiction.to_string()),
            None => self.contradictions.push(contradiction),
        }
    }

    fn check_sum(&mut self, setting: &Setting, value: &Value) {
        let Some(key) = &setting.sum else { return };
        let numbers = value.as_array().map(|numbers| numbers.iter().map(|number| number.as_u64().unwrap_or(u64::MAX)));
        let sum = numbers.map(|numbers| numbers.fold(0, u64::saturating_add));
        let expected = self.sizes.number(key).map(|number| number as u64);
        if sum != expected {
            self.contradictions.push(Contradiction {
                key: setting.key.clone(),
                declared: value.clone(),
                origin: "declaration".to_owned(),
                found: expected.into(),
                witness: format!("{key}, which its numbers must add up to"),
            });
        }
    }
}

impl Setting {
    /// The value as the tensors show it, and which tensor does.
    fn find(&self, tensors: &Tensors, sizes: &Sizes) -> Option<(Value, String)> {
        if let Some(value) = &self.value {
            return Some((value.clone(), "the family".to_owned()));
        }
        if let Some(prefix) = &self.blocks {
            return Some((count_blocks(prefix, tensors).into(), format!("the numbers of {prefix:?}")));
        }
        if let Some((dividend, divisor)) = &self.quotient {
            let (dividend_value, by) = (sizes.number(dividend)?, sizes.number(divisor)?);
            let whole = by > 0 && dividend_value.is_multiple_of(by);
            return whole.then(|| ((dividend_value / by).into(), format!("{dividend} / {divisor}")));
        }
        if let Some(name) = &self.present {
            return Some((tensors.contains_key(name).into(), format!("the tensor {name:?}")));
        }
        self.vote(tensors)
    }

    /// The extent that most of the places have; one misshapen tensor must not decide.
    fn vote(&self, tensors: &Tensors) -> Option<(Value, String)> {
        let mut votes: Vec<(usize, &str, usize)> = Vec::new();
        for (place, axis) in &self.extent {
            let pattern = Pattern::new(place);
            let range = if pattern.is_numbered() {
                tensors.range::<String, _>(..)
            } else {
                tensors.range(place.clone()..=place.clone())
            };
            let voters = range.filter(|(name, _)| pattern.captures(name).is_some());
            for (name, extent) in voters.filter_map(|(name, tensor)| Some((name, *tensor.info.shape.get(*axis)?))) {
                match votes.iter_mut().find(|(value, ..)| *value == extent) {
                    Some((_, _, count)) => *count += 1,
                    None => votes.push((extent, name, 1)),
                }
            }
        }
        let most = votes.iter().map(|(.., count)| *count).max()?;
        let (value, name, _) = votes.into_iter().find(|(.., count)| *count == most)?;
        Some((value.into(), format!("the shape of {name:?}")))
    }

    fn published(&self, sizes: &Sizes) -> Result<Value> {
        match &self.published {
            Some(value) if sizes.satisfy(&self.when) => Ok(value.clone()),
            Some(value) => {
                let when = Value::Object(self.when.clone());
                Err(self.open(format!("the published value {value} holds for {when} alone")))
            }
            None => {
                let places: Vec<&String> = self.extent.iter().map(|(place, _)| place).collect();
                Err(self.open(format!("what would show it is missing or no whole number (tensors {places:?})")))
            }
        }
    }

    fn open(&self, reason: String) -> LayoutError {
        let reason = format!("{reason}; give the model's config.json with --config");
        LayoutError::Ambiguous { what: format!("{:?}", self.key), reason }
    }

    fn believable(&self, declared: &Value, origin: &str) -> Result<()> {
        if self.blocks.is_some() && declared.as_u64().is_none_or(|count| count > MOST_BLOCKS) {
            let reason = format!("{origin} declares {declared}, expected a number up to {MOST_BLOCKS}; mend it");
            return Err(LayoutError::Ambiguous { what: format!("{:?}", self.key), reason });
        }
        Ok(())
    }
}

/// How many blocks there are: up to the highest number where most numbers below it occur, so that a missing block is
/// found missing; else up to the first gap.
fn count_blocks(prefix: &str, tensors: &Tensors) -> usize {
    let pattern = Pattern::new(prefix);
    let number = |name: &String| pattern.captures_start(name).and_then(|(captures, _)| captures.number);
    let numbers: BTreeSet<usize> = tensors.keys().filter_map(number).collect();
    let highest = numbers.last().map_or(0, |last| last + 1);
    if numbers.len() * 2 > highest { highest } else { (0..).zip(&numbers).take_while(|(at, n)| at == *n).count() }
}

fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
