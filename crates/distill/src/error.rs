//! What can go wrong in distillation.

use std::path::PathBuf;

/// Errors of this crate.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DistillError {
    /// A file or folder cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file of a sample set or a training state cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// A setting has a value that training cannot use.
    #[error("setting {key}: {reason}")]
    BadSetting {
        /// Its key.
        key: &'static str,
        /// What was expected and found.
        reason: String,
    },
    /// A sample set or a training state exists, but was created with other settings.
    #[error(
        "{path} was created with other settings ({differing}); pass the same settings again, or delete it to start over",
        path = path.display()
    )]
    OtherSettings {
        /// The file that records the settings.
        path: PathBuf,
        /// The settings that differ, with the recorded and the new value.
        differing: String,
    },
    /// Teacher, student and training state do not belong together.
    #[error("{0}")]
    Mismatch(String),
    /// A loss or a gradient is NaN or infinite.
    #[error(
        "step {step}: the {what} is not finite. Likely cause: a learning rate that is too high, or a damaged teacher; \
         start over with a lower --lr"
    )]
    NotFinite {
        /// The step, counted from 1.
        step: usize,
        /// Loss or gradient.
        what: &'static str,
    },
    /// Prompts cannot be encoded.
    #[error("prompt {prompt:?}: {source}")]
    Prompt {
        /// The first of the prompts that were encoded together.
        prompt: String,
        /// The encoder's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A model rejects its input or its weights.
    #[error(transparent)]
    Model(#[from] clearform_models::ModelError),
    /// Sampling fails.
    #[error(transparent)]
    Sampling(#[from] clearform_sampling::SamplingError),
    /// Tensors cannot be read or written.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// candle rejects a computation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, DistillError>;
