//! [`TokenizerConfig`]: tokenizer_config.json, and what all tokenizer files have in common.

use crate::{ModelError, Result};
use serde_json::{Value, json};

/// transformers writes 1e30 where a tokenizer has no maximum length. Anything above this means none.
const LONGEST: usize = 1 << 20;

/// tokenizer_config.json. Without a file every key is absent.
pub(super) struct TokenizerConfig(Value);

impl TokenizerConfig {
    /// Parses the file, if there is one.
    pub(super) fn parse(config: Option<&[u8]>) -> Result<Self> {
        Ok(Self(config.map_or(Ok(Value::Null), |bytes| parse("tokenizer_config.json", bytes))?))
    }

    /// The special token `key`, which is stored as a string or as an object with the key "content".
    pub(super) fn token(&self, key: &str, default: &str) -> String {
        let value = &self.0[key];
        value.as_str().or_else(|| value["content"].as_str()).unwrap_or(default).to_owned()
    }

    /// A boolean; none if it is absent or null.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        self.0[key].as_bool()
    }

    /// A boolean that is `default` if it is absent, and false if it is null, as in Python.
    pub(super) fn flag_or(&self, key: &str, default: bool) -> bool {
        self.0.get(key).map_or(default, |value| value.as_bool().unwrap_or(false))
    }

    /// A whole number.
    pub(super) fn count(&self, key: &str) -> Option<u64> {
        self.0[key].as_u64()
    }

    /// `model_max_length`, if there is one.
    pub(super) fn max_length(&self) -> Option<usize> {
        self.count("model_max_length").map(|length| length as usize).filter(|length| *length < LONGEST)
    }

    /// `added_tokens_decoder` as the "added_tokens" of a tokenizer.json, ordered by id.
    pub(super) fn added_tokens(&self) -> Option<Vec<Value>> {
        let listed = self.0["added_tokens_decoder"].as_object()?;
        let mut tokens: Vec<(u64, &Value)> =
            listed.iter().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
        tokens.sort_by_key(|(id, _)| *id);
        Some(tokens.into_iter().map(|(id, token)| added_token(id, token.clone())).collect())
    }
}

/// An entry of "added_tokens" in a tokenizer.json. Flags that `token` lacks have the defaults of transformers'
/// `AddedToken`.
pub(super) fn added_token(id: u64, token: Value) -> Value {
    let flag = |key: &str, default| token[key].as_bool().unwrap_or(default);
    json!({
        "id": id,
        "content": token["content"],
        "single_word": flag("single_word", false),
        "lstrip": flag("lstrip", false),
        "rstrip": flag("rstrip", false),
        "normalized": flag("normalized", true),
        "special": flag("special", true),
    })
}

/// Parses a JSON file.
pub(super) fn parse<T: serde::de::DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| bad(file, error))
}

/// [`ModelError::Tokenizer`] for `file`.
pub(super) fn bad(file: &str, reason: impl std::fmt::Display) -> ModelError {
    ModelError::Tokenizer(format!("{file}: {reason}"))
}
