//! [`Hints`]: what the user says of a checkpoint.

use serde_json::Value;

/// What the user says of a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct Hints {
    /// Take this family.
    pub family: Option<String>,
    /// Take this variant.
    pub variant: Option<String>,
    /// Take this in place of the checkpoint's config.json.
    pub config: Option<Value>,
}
