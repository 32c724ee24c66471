//! Errors of pipelines.

use std::path::PathBuf;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// A file or folder cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A component of the pipeline is missing.
    #[error(
        "{name} is missing; searched {searched}. To take it from another model of the same family, pass --components DIR \
         with the diffusers folder of that model{option}"
    )]
    MissingComponent {
        /// The name of its folder in a diffusers pipeline.
        name: String,
        /// The folders that were searched.
        searched: String,
        /// The option that takes a file of the component, with a comma before it; empty if there is none.
        option: String,
    },
    /// A component of the pipeline exists, but cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    BadComponent {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// What was asked for does not fit into memory.
    #[error("not enough memory: {0}")]
    NotEnoughMemory(String),
    /// A setting that the model cannot use.
    #[error("{0}")]
    BadSetting(String),
    /// An image that must not be saved or cannot be compared, or a file without parameters of clearform.
    #[error("image: {0}")]
    BadImage(String),
    /// No tensor of an adapter edits the model.
    #[error("{0}\n  nothing of it can be applied here: leave it out, or give it with the model that it was made for")]
    UnusedAdapter(String),
    /// Tensors of an adapter have no counterpart in the model.
    #[error("{0}\n  pass --allow-partial to continue without them")]
    PartialAdapter(String),
    /// A plugin, or what it opens, cannot be used.
    #[error(transparent)]
    Plugin(#[from] clearform_plugin_host::PluginError),
    /// Tensors cannot be read or written.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// The checkpoint is of no known family, or is incomplete.
    #[error("{path}: {source}", path = path.display())]
    BadCheckpoint {
        /// Its file or folder.
        path: PathBuf,
        /// What does not fit.
        source: clearform_layout::LayoutError,
    },
    /// A manifest is invalid, or tensors do not fit what it says.
    #[error(transparent)]
    Layout(#[from] clearform_layout::LayoutError),
    /// The portable model is incomplete, or its record cannot be read.
    #[error(transparent)]
    PortableModel(#[from] clearform_portable_model::PortableModelError),
    /// A model rejects its input or its weights.
    #[error(transparent)]
    Model(#[from] clearform_models::ModelError),
    /// The scheduler or the denoising loop fails.
    #[error(transparent)]
    Sampling(#[from] clearform_sampling::SamplingError),
    /// candle rejects a computation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, RuntimeError>;
