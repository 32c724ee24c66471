//! [`ResolvedConfig`]: the settings of a model, from what config.json declares and what the tensors show.
//!
//! A declared value counts, and is checked against the tensors: many settings cannot be read from tensors, so the
//! config is the more complete of the two, and a difference is reported as a conflict.

use crate::error::Result;
use crate::manifest::config_values::{ConfigValues, equal};
use crate::manifest::conflict::ConfigConflict;
use crate::manifest::evidence::TensorsByName;
use crate::manifest::setting::Setting;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Settings that come from outside the tensors.
#[derive(Clone, Copy)]
pub(crate) struct DeclaredConfig<'a> {
    /// The content of config.json.
    pub config: Option<&'a Value>,
    /// Metadata of the tensor files, which may hold a config as JSON or single keys of one.
    pub metadata: &'a BTreeMap<String, String>,
    /// How the user can pass a config.json, for errors.
    pub remedy: &'static str,
    /// Settings that all files of the layout have, if nothing else declares them.
    pub layout: Option<&'a Map<String, Value>>,
    /// Settings of the variant that the user or the pipeline names, if nothing else declares them.
    pub variant: Option<&'a Map<String, Value>>,
}

impl DeclaredConfig<'_> {
    /// The declared value of `key` and where it is declared. null counts as not declared.
    pub fn get(&self, key: &str) -> Option<(Value, &'static str)> {
        self.in_config(key).or_else(|| self.in_metadata(key))
    }

    fn in_config(&self, key: &str) -> Option<(Value, &'static str)> {
        let value = self.config?.get(key).filter(|value| !value.is_null())?;
        Some((value.clone(), "config.json"))
    }

    fn in_metadata(&self, key: &str) -> Option<(Value, &'static str)> {
        let config = self.metadata.get("config").and_then(|text| serde_json::from_str::<Value>(text).ok());
        let in_config = config.and_then(|config| config.get(key).cloned());
        let value = in_config.or_else(|| serde_json::from_str(self.metadata.get(key)?).ok())?;
        (!value.is_null()).then_some((value, "the file's metadata"))
    }
}

/// All settings of a model, and where they were found.
#[derive(Debug, Default)]
pub(crate) struct ResolvedConfig {
    pub sizes: ConfigValues,
    pub config: Map<String, Value>,
    /// Values with their tensors.
    pub evidence: Vec<String>,
    /// Values that were assumed.
    pub notes: Vec<String>,
    pub conflicts: Vec<ConfigConflict>,
}

impl ResolvedConfig {
    /// Resolves `settings` in order, so that later ones may refer to earlier ones.
    pub fn new(settings: &[Setting], tensors: &TensorsByName, declared: DeclaredConfig) -> Result<Self> {
        let mut resolved = Self::default();
        for setting in settings {
            resolved.resolve(setting, tensors, declared)?;
        }
        Ok(resolved)
    }

    /// In order of precedence: the declared value, what the tensors show, what may be assumed.
    fn resolve(&mut self, setting: &Setting, tensors: &TensorsByName, declared: DeclaredConfig) -> Result<()> {
        let found = setting.find(tensors, &self.sizes);
        let value = match (declared.get(setting.declared_as()), found) {
            (Some((declared, origin)), found) => {
                setting.check_declared(&declared, found.as_ref().map(|(found, _)| found), origin)?;
                if let Some((found, witness)) = found.filter(|(found, _)| !equal(found, &declared)) {
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

    /// The value that every file of the layout has, or else that of the published models; a note names the latter, as a
    /// model may have been trained with another.
    fn assume(&mut self, setting: &Setting, declared: DeclaredConfig) -> Result<Value> {
        let key = &setting.key;
        if let Some(value) = declared.layout.and_then(|settings| settings.get(key)) {
            if !setting.hidden {
                self.evidence.push(format!("{key} {value}, as in every file of this layout"));
            }
            return Ok(value.clone());
        }
        if let Some(value) = declared.variant.and_then(|settings| settings.get(key)) {
            self.evidence.push(format!("{key} {value}, as in every model of this variant"));
            return Ok(value.clone());
        }
        let value = match setting.published(&self.sizes, declared.remedy) {
            Err(_) if setting.optional => return Ok(Value::Null),
            published => published?,
        };
        self.notes.push(format!("{key} {value} is assumed, as in the published models"));
        Ok(value)
    }

    /// Another number of blocks is only a note: the tensors of the difference are reported by name, as missing or
    /// unmatched.
    fn report_conflict(&mut self, setting: &Setting, declared: (&Value, &str), found: (Value, String)) {
        let conflict = ConfigConflict {
            key: setting.key.clone(),
            declared: declared.0.clone(),
            origin: declared.1.to_owned(),
            found: found.0,
            witness: found.1,
        };
        match setting.blocks {
            Some(_) => self.notes.push(conflict.to_string()),
            None => self.conflicts.push(conflict),
        }
    }

    fn check_sum(&mut self, setting: &Setting, value: &Value) {
        let Some(key) = &setting.sum else { return };
        let entries = value.as_array().map(|entries| entries.iter().map(|entry| entry.as_u64().unwrap_or(u64::MAX)));
        let sum = entries.map(|entries| entries.fold(0, u64::saturating_add));
        let expected = self.sizes.integer(key).map(|expected| expected as u64);
        if sum != expected {
            self.conflicts.push(ConfigConflict {
                key: setting.key.clone(),
                declared: value.clone(),
                origin: "the configuration".to_owned(),
                found: expected.into(),
                witness: format!("{key}, to which its entries must add up"),
            });
        }
    }
}
