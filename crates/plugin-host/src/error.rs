//! [`PluginError`]: errors of plugins and of the adapters that they open.

use crate::PluginOrigin;
use std::path::PathBuf;

/// Errors of this crate. Names that come from files are escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The operating system reported an error.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A library is not a plugin, or a plugin violates the plugin interface.
    #[error("plugin {plugin}: {reason}")]
    BadPlugin {
        /// The plugin's library, or the program.
        plugin: PluginOrigin,
        /// What was expected and found, and what to do.
        reason: String,
    },
    /// No plugin opens this adapter, or several do.
    #[error("{adapter}: {reason}", adapter = adapter.display())]
    NoPlugin {
        /// The adapter.
        adapter: PathBuf,
        /// Which plugins are available, and what to do.
        reason: String,
    },
    /// The plugin rejects the adapter, or the adapter does not fit the model.
    #[error("{adapter}: {reason}", adapter = adapter.display())]
    BadAdapter {
        /// The adapter.
        adapter: PathBuf,
        /// What was expected and found, and what to do.
        reason: String,
    },
    /// A tensor cannot be read.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// candle reported an error.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, PluginError>;
