//! [`ModelError`]: errors of building and running models.

/// Errors of this crate.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A value in config.json that this crate does not support, or that contradicts another.
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
        /// The argument's name in the family's diffusers class.
        name: String,
        /// What was expected and found.
        reason: String,
    },
    /// A tokenizer file cannot be used, or a prompt cannot be tokenized.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A text encoder is not available.
    #[error(transparent)]
    Encoder(Box<dyn std::error::Error + Send + Sync>),
    /// A weight is missing or cannot be read.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// A tensor operation failed.
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
