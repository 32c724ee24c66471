//! What can go wrong between a model folder and a picture.

use std::path::PathBuf;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A part of the pipeline is nowhere.
    #[error(
        "{name} is missing, looked for it in {looked}. Give a diffusers folder that has it with --components DIR, that of \
         any model of the same family"
    )]
    MissingComponent {
        /// Its folder's name in a diffusers pipeline.
        name: String,
        /// The folders that were looked through.
        looked: String,
    },
    /// A part of the pipeline is there, but cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    BadComponent {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// A setting that no picture can be made with.
    #[error("{0}")]
    BadSetting(String),
    /// A picture that must not be saved, or a file that is not one of ours.
    #[error("picture: {0}")]
    BadImage(String),
    /// Tensors of an adapter met nothing in the model.
    #[error("{0}\n  --allow-partial goes on without them")]
    PartialAdapter(String),
    /// A plugin, or what it opens, cannot be used.
    #[error(transparent)]
    Plugin(#[from] clearform_plugin_host::PluginError),
    /// Weights cannot be had.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// The checkpoint is no model that is known, or is not whole.
    #[error(transparent)]
    Layout(#[from] clearform_layout::LayoutError),
    /// The portable model is not whole, or its record cannot be read.
    #[error(transparent)]
    PortableModel(#[from] clearform_portable_model::PortableModelError),
    /// A model refused.
    #[error(transparent)]
    Model(#[from] clearform_models::ModelError),
    /// Noise, schedule or denoising refused.
    #[error(transparent)]
    Sampling(#[from] clearform_sampling::SamplingError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, RuntimeError>;
