//! What can be wrong with a file of tensors, said so that a person can mend it.

use std::path::PathBuf;

const LONGEST_PRINTED: usize = 60;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not what its name promises.
    #[error("{path}: {reason}", path = path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// A tensor was asked for that the source does not have.
    #[error("tensor {name:?} is missing")]
    Missing {
        /// The name that was asked for.
        name: String,
    },
    /// A tensor has a number format that cannot be computed with.
    #[error("tensor {name:?}: {reason}")]
    BadTensor {
        /// The tensor.
        name: String,
        /// What was expected and found.
        reason: String,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, WeightsError>;

/// What holds, or the reason why not.
pub(crate) type Validated<T> = std::result::Result<T, String>;

/// A name as a message shows it: escaped, and no longer than a person reads.
pub(crate) fn printed(name: &str) -> String {
    match name.char_indices().nth(LONGEST_PRINTED) {
        Some((end, _)) => format!("{:?}...", &name[..end]),
        None => format!("{name:?}"),
    }
}
