//! [`Hints`]: what the user states about a checkpoint.

use serde_json::Value;

/// What the user states about a checkpoint. It takes precedence over what is detected.
#[derive(Debug, Clone, Default)]
pub struct Hints {
    /// The family, in place of the detected one.
    pub family: Option<String>,
    /// The variant, in place of the detected one.
    pub variant: Option<String>,
    /// The class of its pipeline in diffusers, by default that of the model_index.json beside its folder.
    pub pipeline: Option<String>,
    /// A config.json to use in place of the checkpoint's.
    pub config: Option<Value>,
}
