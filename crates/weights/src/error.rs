//! [`WeightsError`]: what can be wrong with a tensor file, and how to fix it.

use std::path::PathBuf;

/// Characters of a name that a message prints.
const LONGEST_PRINTED: usize = 60;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The operating system reported an error.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file is damaged or of another format.
    #[error("{path}: {reason}", path = path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// The source has no tensor of this name.
    #[error("tensor {name:?} is missing")]
    Missing {
        /// The requested name.
        name: String,
    },
    /// A tensor has the wrong shape or dtype, or a dtype that candle cannot compute with.
    #[error("tensor {name:?}: {reason}")]
    BadTensor {
        /// The tensor.
        name: String,
        /// What was expected and found.
        reason: String,
    },
    /// An error of candle.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, WeightsError>;

/// A checked value, or why it is refused. The caller adds the file to the message.
pub(crate) type Validated<T> = std::result::Result<T, String>;

/// A name as messages show it: escaped and cut to a readable length.
pub(crate) fn printed(name: &str) -> String {
    match name.char_indices().nth(LONGEST_PRINTED) {
        Some((end, _)) => format!("{:?}...", &name[..end]),
        None => format!("{name:?}"),
    }
}
