//! Errors of portable models.

use std::path::{Path, PathBuf};

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PortableModelError {
    /// A file or folder cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The target exists, or an earlier run has left work for it.
    #[error("{path}: {reason}", path = path.display())]
    AlreadyExists {
        /// The folder.
        path: PathBuf,
        /// What was found and what to do.
        reason: String,
    },
    /// A folder is not a valid portable model.
    #[error("{path}: {reason}", path = path.display())]
    Invalid {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// The disk has too little free space.
    #[error("{path}: {needed} bytes are needed, {free} are free; free some space or write to another disk", path = path.display())]
    DiskFull {
        /// The folder that was going to be written.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
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
pub type Result<T> = std::result::Result<T, PortableModelError>;

/// Adds the path to a system error.
pub(crate) fn at(path: &Path) -> impl FnOnce(std::io::Error) -> PortableModelError + '_ {
    move |source| PortableModelError::Io { path: path.to_owned(), source }
}
