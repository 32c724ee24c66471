//! What can go wrong with a portable model on disk.

use std::path::{Path, PathBuf};

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PortableModelError {
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder stands where one is to be made, or work of an earlier run does.
    #[error("{path}: {reason}", path = path.display())]
    AlreadyExists {
        /// The folder.
        path: PathBuf,
        /// What it is and what to do.
        reason: String,
    },
    /// A portable model is not what it should be.
    #[error("{path}: {reason}", path = path.display())]
    Invalid {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// There is too little room on the disk.
    #[error("{path}: {needed} bytes are needed, {free} are free; give another place or make room", path = path.display())]
    DiskFull {
        /// Where it was to be written.
        path: PathBuf,
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
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
pub type Result<T> = std::result::Result<T, PortableModelError>;

/// Puts the path to what the system says.
pub(crate) fn at(path: &Path) -> impl FnOnce(std::io::Error) -> PortableModelError + '_ {
    move |source| PortableModelError::Io { path: path.to_owned(), source }
}
