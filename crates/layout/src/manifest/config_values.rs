//! [`ConfigValues`]: the values of a model's settings by key.

use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The values of settings, including those that config.json does not have.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConfigValues(BTreeMap<String, Value>);

impl ConfigValues {
    /// The non-negative integer `key`.
    pub fn integer(&self, key: &str) -> Option<usize> {
        self.0.get(key)?.as_u64().and_then(|value| usize::try_from(value).ok())
    }

    /// Whether `key` is set: not missing, false, null or an empty list.
    pub fn is_set(&self, key: &str) -> bool {
        match self.0.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(flag)) => *flag,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(_) => true,
        }
    }

    /// The list `key`.
    pub fn list(&self, key: &str) -> Option<&[Value]> {
        self.0.get(key)?.as_array().map(Vec::as_slice)
    }

    /// Whether the list `key` contains `number`.
    pub fn list_contains(&self, key: &str, number: usize) -> bool {
        self.list(key).is_some_and(|list| list.iter().any(|entry| entry.as_u64() == Some(number as u64)))
    }

    /// Whether every key of `conditions` has the value given there, or one of a list of values. The conditions true and
    /// false ask whether the key is set.
    pub fn satisfies(&self, conditions: &Map<String, Value>) -> bool {
        conditions.iter().all(|(key, condition)| match (self.0.get(key), condition) {
            (_, Value::Bool(expected)) => self.is_set(key) == *expected,
            (Some(found), Value::Array(values)) if !found.is_array() => values.iter().any(|value| equal(found, value)),
            (found, value) => found.is_some_and(|found| equal(found, value)),
        })
    }

    /// Sets `key` to `value`.
    pub fn set(&mut self, key: String, value: Value) {
        self.0.insert(key, value);
    }
}

/// Whether two values are equal; 1 and 1.0 are.
pub(crate) fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
