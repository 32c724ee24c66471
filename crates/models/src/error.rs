//! What can go wrong when a model is built or run.

/// Errors of this crate.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configuration is not one of this family.
    #[error("config key {key:?}: {reason}")]
    BadConfig {
        /// The key of config.json.
        key: String,
        /// What was expected and found.
        reason: String,
    },
    /// An input tensor is missing or misshapen.
    #[error("input {name:?}: {reason}")]
    BadInput {
        /// The input, as the family's diffusers class names it.
        name: String,
        /// What was expected and found.
        reason: String,
    },
    /// A tokenizer file cannot be used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A text encoder cannot be had.
    #[error(transparent)]
    Encoder(Box<dyn std::error::Error + Send + Sync>),
    /// A weight cannot be had.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

impl ModelError {
    pub(crate) fn bad_input(name: &str, reason: impl Into<String>) -> Self {
        Self::BadInput { name: name.to_owned(), reason: reason.into() }
    }

    pub(crate) fn missing_input(name: &str) -> Self {
        Self::bad_input(name, "is missing")
    }
}
