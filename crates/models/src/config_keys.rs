//! [`ConfigKeys`]: reads a config.json key by key, with errors that name the key.

use crate::{ModelError, Result};
use serde_json::Value;

/// No model has larger sizes. Refusing them keeps a mistyped config from allocating all memory.
const LARGEST: u64 = 1 << 24;

/// The keys of a config.json. For a key that is absent or null, methods return the default of the class that wrote it.
#[derive(Clone, Copy)]
pub(crate) struct ConfigKeys<'a>(&'a Value);

impl<'a> ConfigKeys<'a> {
    pub(crate) fn new(config: &'a Value) -> Result<Self> {
        match config {
            Value::Object(_) => Ok(Self(config)),
            _ => Err(bad("", "expected a JSON object in config.json")),
        }
    }

    pub(crate) fn count(&self, key: &str, default: impl Into<Option<usize>>) -> Result<usize> {
        match self.get(key) {
            Some(value) => as_count(key, value),
            None => default.into().ok_or_else(|| bad(key, "is missing")),
        }
    }

    pub(crate) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|value| as_count(key, value)).transpose()
    }

    pub(crate) fn counts(&self, key: &str, default: &[usize]) -> Result<Vec<usize>> {
        match self.get(key) {
            Some(Value::Array(items)) => items.iter().map(|item| as_count(key, item)).collect(),
            Some(other) => Err(bad(key, format!("expected a list of whole numbers, found {other}"))),
            None => Ok(default.to_vec()),
        }
    }

    pub(crate) fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            Some(value) => value.as_f64().ok_or_else(|| bad(key, format!("expected a number, found {value}"))),
            None => Ok(default),
        }
    }

    pub(crate) fn flag(&self, key: &str, default: impl Into<Option<bool>>) -> Result<bool> {
        match self.get(key) {
            Some(value) => value.as_bool().ok_or_else(|| bad(key, format!("expected true or false, found {value}"))),
            None => default.into().ok_or_else(|| bad(key, "is missing")),
        }
    }

    pub(crate) fn text(&self, key: &str, default: &'a str) -> Result<&'a str> {
        match self.get(key) {
            Some(value) => value.as_str().ok_or_else(|| bad(key, format!("expected a string, found {value}"))),
            None => Ok(default),
        }
    }

    /// Fails for head counts and dimensions that the attention kernels do not support.
    pub(crate) fn expect_heads(&self, heads: usize, head_dim: usize) -> Result<()> {
        match (heads, head_dim) {
            (0, _) => Err(bad("num_attention_heads", "expected at least 1, found 0")),
            (_, 4..=256) => Ok(()),
            _ => Err(bad("attention_head_dim", format!("expected 4 to 256, found {head_dim}"))),
        }
    }

    /// Fails unless `patch_size` is 1 to 64.
    pub(crate) fn expect_patch_size(&self, patch_size: usize) -> Result<()> {
        match patch_size {
            1..=64 => Ok(()),
            _ => Err(bad("patch_size", format!("expected 1 to 64, found {patch_size}"))),
        }
    }

    /// Fails if the list `key` contains anything but `supported`. An absent list passes.
    pub(crate) fn expect_all(&self, key: &str, supported: &str) -> Result<()> {
        let items = self.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        match items.iter().find(|item| item.as_str() != Some(supported)) {
            Some(other) => Err(bad(key, format!("{other} is not supported, only {supported:?}"))),
            None => Ok(()),
        }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }
}

/// [`ModelError::BadConfig`] for `key`.
pub(crate) fn bad(key: &str, reason: impl Into<String>) -> ModelError {
    ModelError::BadConfig { key: key.to_owned(), reason: reason.into() }
}

fn as_count(key: &str, value: &Value) -> Result<usize> {
    let number = value.as_u64().ok_or_else(|| bad(key, format!("expected a whole number, found {value}")))?;
    match number {
        0..=LARGEST => Ok(number as usize),
        _ => Err(bad(key, format!("expected at most {LARGEST}, found {number}; the file may be damaged"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn absent_and_null_keys_take_the_default() {
        let config = json!({"heads": 3, "out": null});
        let keys = ConfigKeys::new(&config).unwrap();
        assert_eq!(keys.count("heads", None).unwrap(), 3);
        assert_eq!(keys.count("out", 16).unwrap(), 16);
        assert_eq!(keys.text("act_fn", "silu").unwrap(), "silu");
    }

    #[test]
    fn errors_name_the_key_and_what_was_found() {
        let cases = [
            (json!({"heads": "three"}), "config key \"heads\": expected a whole number, found \"three\""),
            (json!({"heads": -1}), "config key \"heads\": expected a whole number, found -1"),
            (json!({"heads": 1e9 as u64}), "expected at most 16777216, found 1000000000"),
            (json!({}), "config key \"heads\": is missing"),
        ];
        for (config, expected) in cases {
            let error = ConfigKeys::new(&config).unwrap().count("heads", None).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = ConfigKeys::new(&json!([])).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("expected a JSON object"), "{error}");
    }
}
