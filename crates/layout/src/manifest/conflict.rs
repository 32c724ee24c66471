//! [`ConfigConflict`]: a setting for which config.json and the tensors have different values.

use serde::Serialize;
use serde_json::Value;
use std::fmt;

/// A setting for which two sources have different values.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConfigConflict {
    /// Its key in config.json.
    pub key: String,
    /// The declared value.
    pub declared: Value,
    /// Where it is declared.
    pub origin: String,
    /// The other value.
    pub found: Value,
    /// Where the other value is from.
    pub witness: String,
}

impl fmt::Display for ConfigConflict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { key, declared, origin, found, witness } = self;
        write!(f, "{key:?} is {declared} in {origin}, {found} from {witness}")
    }
}
