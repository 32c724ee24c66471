//! How scheduler_config.json is read: what is known, and what is refused by name. It knows no schedule.

use crate::{Result, SamplingError};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Names of the classes that are read.
pub(crate) mod class {
    pub(crate) const DDIM: &str = "DDIMScheduler";
    pub(crate) const DPM_SOLVER: &str = "DPMSolverMultistepScheduler";
    pub(crate) const FLOW_MATCH: &str = "FlowMatchEulerDiscreteScheduler";
}

/// What a class of scheduler accepts.
pub(crate) struct AcceptedKeys {
    /// The diffusers class.
    pub class: &'static str,
    /// Options that must not be set.
    pub unsupported: &'static [&'static str],
    /// Options that are one of a few words.
    pub words: &'static [(&'static str, &'static [&'static str])],
}

impl AcceptedKeys {
    /// Reads `config`, with T's defaults for what it lacks. Keys that this class does not have are ignored, as diffusers
    /// does.
    pub(crate) fn read<T: DeserializeOwned>(&self, config: &Value) -> Result<T> {
        self.refuse_other_class(config)?;
        self.unsupported.iter().try_for_each(|key| refuse_if_set(config, key))?;
        self.words.iter().try_for_each(|(key, words)| refuse_other_word(config, key, words))?;
        serde_json::from_value(config.clone()).map_err(|error| bad("(whole file)", error.to_string()))
    }

    fn refuse_other_class(&self, config: &Value) -> Result<()> {
        match config.get("_class_name").and_then(Value::as_str) {
            None => Ok(()),
            Some(found) if found == self.class => Ok(()),
            Some(found) => {
                let reason = format!("expected {:?}, found {found:?}; use a model of that class", self.class);
                Err(bad("_class_name", reason))
            }
        }
    }
}

/// Parses the text of scheduler_config.json. Python writes minus infinity, the default of DPMSolverMultistepScheduler's
/// `lambda_min_clipped`, as no JSON allows it; it is read as null.
pub(crate) fn parse(text: &str) -> Result<Value> {
    serde_json::from_str(text)
        .or_else(|_| serde_json::from_str(&text.replace(": -Infinity", ": null")))
        .map_err(|error| bad("(whole file)", format!("expected JSON: {error}")))
}

pub(crate) fn bad(key: &'static str, reason: impl Into<String>) -> SamplingError {
    SamplingError::BadScheduler { key, reason: reason.into() }
}

fn refuse_if_set(config: &Value, key: &'static str) -> Result<()> {
    match config.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => Ok(()),
        Some(found) => {
            Err(bad(key, format!("expected false, found {found}: this option is not supported; set it to false")))
        }
    }
}

fn refuse_other_word(config: &Value, key: &'static str, words: &[&str]) -> Result<()> {
    match config.get(key) {
        None => Ok(()),
        Some(Value::String(found)) if words.contains(&found.as_str()) => Ok(()),
        Some(found) => Err(bad(key, format!("expected one of {words:?}, found {found}"))),
    }
}
