//! [`AcceptedKeys`]: reads scheduler_config.json, and refuses options that are not supported by name.

use crate::{Result, SamplingError};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Names of the supported classes.
pub(crate) mod class {
    pub(crate) const DDIM: &str = "DDIMScheduler";
    pub(crate) const DPM_SOLVER: &str = "DPMSolverMultistepScheduler";
    pub(crate) const FLOW_MATCH: &str = "FlowMatchEulerDiscreteScheduler";
}

/// What is supported of a scheduler class's config.
pub(crate) struct AcceptedKeys {
    /// The diffusers class.
    pub class: &'static str,
    /// Options that must be absent, null or false.
    pub unsupported: &'static [&'static str],
    /// Options that must be one of a list of strings.
    pub choices: &'static [(&'static str, &'static [&'static str])],
}

impl AcceptedKeys {
    /// Reads `config`. Absent keys have T's defaults. As in diffusers, keys that the class does not have are ignored.
    pub(crate) fn read<T: DeserializeOwned>(&self, config: &Value) -> Result<T> {
        self.refuse_other_class(config)?;
        self.unsupported.iter().try_for_each(|key| refuse_if_set(config, key))?;
        self.choices.iter().try_for_each(|(key, choices)| expect_choice(config, key, choices))?;
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

/// Parses the text of scheduler_config.json. Python writes the default of `lambda_min_clipped` as -Infinity, which is
/// not JSON; it is read as null.
pub(crate) fn parse(text: &str) -> Result<Value> {
    serde_json::from_str(text).or_else(|_| serde_json::from_str(&text.replace(": -Infinity", ": null"))).map_err(
        |error| {
            SamplingError::BadSetting(format!(
                "expected JSON: {error}; copy the file again from where the model came from"
            ))
        },
    )
}

/// [`SamplingError::BadScheduler`] for `key`.
pub(crate) fn bad(key: &'static str, reason: impl Into<String>) -> SamplingError {
    SamplingError::BadScheduler { key, reason: reason.into() }
}

fn refuse_if_set(config: &Value, key: &'static str) -> Result<()> {
    match config.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => Ok(()),
        Some(found) => {
            Err(bad(key, format!("expected false, found {found}; this option is not supported, set it to false")))
        }
    }
}

fn expect_choice(config: &Value, key: &'static str, choices: &[&str]) -> Result<()> {
    match config.get(key) {
        None => Ok(()),
        Some(Value::String(found)) if choices.contains(&found.as_str()) => Ok(()),
        Some(found) => Err(bad(key, format!("expected one of {choices:?}, found {found}"))),
    }
}
