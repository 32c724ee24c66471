//! [`ResolvedConfig`]: the settings of a model, from what is declared and what the tensors show; [`ConfigValues`]: their values.
//!
//! What config.json declares counts; what the tensors show is held against it.

use crate::error::Result;
use crate::manifest::config_values::{ConfigValues, same};
use crate::manifest::evidence::TensorsByName;
use crate::manifest::setting::Setting;
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;

/// A setting that two witnesses give differently.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConfigConflict {
    /// Key of config.json.
    pub key: String,
    /// The value that was declared.
    pub declared: Value,
    /// Who declared it.
    pub origin: String,
    /// The other value.
    pub found: Value,
    /// Who gives the other value.
    pub witness: String,
}

/// What is said of the settings outside the tensors.
#[derive(Clone, Copy)]
pub(crate) struct DeclaredConfig<'a> {
    pub config: Option<&'a Value>,
    pub metadata: &'a BTreeMap<String, String>,
    /// How a person gives the config.json where it is wanted.
    pub remedy: &'static str,
    /// What holds for files of this layout, where nothing else says it.
    pub layout: Option<&'a Map<String, Value>>,
}

impl DeclaredConfig<'_> {
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
pub(crate) struct ResolvedConfig {
    pub sizes: ConfigValues,
    pub config: Map<String, Value>,
    pub evidence: Vec<String>,
    pub notes: Vec<String>,
    pub contradictions: Vec<ConfigConflict>,
}

impl ResolvedConfig {
    /// Settles `settings` in order, so that later ones may use earlier ones.
    pub fn new(settings: &[Setting], tensors: &TensorsByName, declared: DeclaredConfig) -> Result<Self> {
        let mut settled = Self::default();
        for setting in settings {
            settled.resolve(setting, tensors, declared)?;
        }
        Ok(settled)
    }

    fn resolve(&mut self, setting: &Setting, tensors: &TensorsByName, declared: DeclaredConfig) -> Result<()> {
        let found = setting.find(tensors, &self.sizes);
        let value = match (declared.get(&setting.key), found) {
            (Some((declared, origin)), found) => {
                setting.believable(&declared, found.as_ref().map(|(found, _)| found), origin)?;
                if let Some((found, witness)) = found.filter(|(found, _)| !same(found, &declared)) {
                    self.report_conflict(setting, (&declared, origin), (found, witness));
                }
                declared
            }
            (None, Some((found, witness))) => {
                self.evidence.push(format!("{} {found} from {witness}", setting.key));
                found
            }
            (None, None) => self.assume(setting, declared)?,
        };
        self.check_sum(setting, &value);
        if !setting.hidden {
            self.config.insert(setting.key.clone(), value.clone());
        }
        self.sizes.set(setting.key.clone(), value);
        Ok(())
    }

    /// What is taken for granted, and said to be.
    fn assume(&mut self, setting: &Setting, declared: DeclaredConfig) -> Result<Value> {
        let key = &setting.key;
        if let Some(value) = declared.layout.and_then(|settings| settings.get(key)) {
            self.evidence.push(format!("{key} {value}, as in every file of this layout"));
            return Ok(value.clone());
        }
        let value = match setting.published(&self.sizes, declared.remedy) {
            Err(_) if setting.optional => return Ok(Value::Null),
            published => published?,
        };
        self.notes.push(format!("{key} {value} is that of the published models"));
        Ok(value)
    }

    /// Another number of blocks is not contradicted here: it shows in the names of missing or unmatched tensors.
    fn report_conflict(&mut self, setting: &Setting, declared: (&Value, &str), found: (Value, String)) {
        let contradiction = ConfigConflict {
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
            self.contradictions.push(ConfigConflict {
                key: setting.key.clone(),
                declared: value.clone(),
                origin: "declaration".to_owned(),
                found: expected.into(),
                witness: format!("{key}, which its numbers must add up to"),
            });
        }
    }
}

impl fmt::Display for ConfigConflict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { key, declared, origin, found, witness } = self;
        write!(f, "{key:?} is {declared} by {origin}, {found} by {witness}")
    }
}
