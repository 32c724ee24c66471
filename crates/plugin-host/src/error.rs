//! What can go wrong with plugins and with what they open.

use std::path::PathBuf;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A library that is no plugin of ours, or does not keep to the boundary.
    #[error("plugin {path}: {reason}", path = path.display())]
    BadPlugin {
        /// The library.
        path: PathBuf,
        /// What was expected and found, and what to do.
        reason: String,
    },
    /// No plugin opens this adapter, or several do.
    #[error("{adapter}: {reason}", adapter = adapter.display())]
    NoPlugin {
        /// The adapter.
        adapter: PathBuf,
        /// Which plugins there are, and what to do.
        reason: String,
    },
    /// The plugin refused the adapter, or the model does not take it.
    #[error("{adapter}: {reason}", adapter = adapter.display())]
    BadAdapter {
        /// The adapter.
        adapter: PathBuf,
        /// What was expected and found, and what to do.
        reason: String,
    },
    /// A tensor cannot be had.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, PluginError>;
