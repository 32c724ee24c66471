//! What can go wrong in distillation.

use std::path::PathBuf;

/// Errors of this crate.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DistillError {
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of a sample set or a checkpoint is not what it should be.
    #[error("{path}: {reason}", path = path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// A setting that nothing can be trained with.
    #[error("setting {key}: {reason}")]
    BadSetting {
        /// The setting.
        key: &'static str,
        /// What was expected and found.
        reason: String,
    },
    /// Work that was begun with other settings cannot be taken up with these.
    #[error("{path} was begun with other settings ({differing}); give those again, or start afresh", path = path.display())]
    OtherSettings {
        /// The file that records them.
        path: PathBuf,
        /// The settings that differ, then and now.
        differing: String,
    },
    /// Teacher, student and settings do not fit each other.
    #[error("{0}")]
    Mismatch(String),
    /// A loss or a gradient is NaN or infinite.
    #[error(
        "step {step}: the {what} is not finite. Likely cause: a learning rate that is too high, or a damaged teacher; \
         start afresh with a lower --lr"
    )]
    NotFinite {
        /// The step, counted from 1.
        step: usize,
        /// Loss or gradient.
        what: &'static str,
    },
    /// The prompts could not be encoded.
    #[error("prompt {prompt:?}: {source}")]
    Prompt {
        /// The prompt.
        prompt: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] clearform_models::ModelError),
    /// Sampling failed.
    #[error(transparent)]
    Sampling(#[from] clearform_sampling::SamplingError),
    /// Tensors could not be had or written.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, DistillError>;
