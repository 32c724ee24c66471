//! Errors of conversion and of attention patches.

use std::path::PathBuf;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// A file or folder cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// A file cannot be used as a patch.
    #[error("{path}: {reason}", path = path.display())]
    BadPatch {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// A patch does not fit the model or the base that it is used with.
    #[error("patch: {0}")]
    DoesNotFit(String),
    /// The portable model cannot be read or written.
    #[error(transparent)]
    Model(#[from] clearform_portable_model::PortableModelError),
    /// The attention plan cannot be read.
    #[error(transparent)]
    Attention(#[from] clearform_attention::AttentionError),
    /// Tensors cannot be read or written.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// candle rejects a computation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ConvertError>;
