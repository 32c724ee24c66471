//! What can go wrong between a checkpoint and a portable model.

use std::path::PathBuf;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A patch is not what it should be.
    #[error("{path}: {reason}", path = path.display())]
    BadPatch {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// A patch does not fit what it is applied to.
    #[error("patch: {0}")]
    DoesNotFit(String),
    /// The portable model cannot be written.
    #[error(transparent)]
    Model(#[from] clearform_portable_model::PortableModelError),
    /// The attention plan cannot be read.
    #[error(transparent)]
    Attention(#[from] clearform_attention::AttentionError),
    /// Tensors cannot be read or written.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ConvertError>;
