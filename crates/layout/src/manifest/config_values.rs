//! [`ConfigValues`]: the values that a model's settings have, by key.

use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Values of settings, hidden ones too.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConfigValues(BTreeMap<String, Value>);

impl ConfigValues {
    pub fn number(&self, key: &str) -> Option<usize> {
        self.0.get(key)?.as_u64().and_then(|number| usize::try_from(number).ok())
    }

    /// Whether `key` is set: neither false nor null nor an empty list.
    pub fn flag(&self, key: &str) -> bool {
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

    /// Whether `number` stands in the list `key`.
    pub fn lists(&self, key: &str, number: usize) -> bool {
        self.list(key).is_some_and(|list| list.iter().any(|one| one.as_u64() == Some(number as u64)))
    }

    /// Whether every key has the value that `conditions` give it, or one of a list of values; true and false ask
    /// whether it is set.
    pub fn satisfy(&self, conditions: &Map<String, Value>) -> bool {
        conditions.iter().all(|(key, condition)| match (self.0.get(key), condition) {
            (_, Value::Bool(flag)) => self.flag(key) == *flag,
            (Some(found), Value::Array(values)) if !found.is_array() => values.iter().any(|value| same(found, value)),
            (found, value) => found.is_some_and(|found| same(found, value)),
        })
    }

    /// Sets `key` to `value`.
    pub fn set(&mut self, key: String, value: Value) {
        self.0.insert(key, value);
    }
}

/// Whether two values are equal, numbers by what they stand for.
pub(crate) fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
