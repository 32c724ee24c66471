//! [`ClearformError`]: errors of the library.

use clearform_distill::DistillError;
use clearform_runtime::RuntimeError;
use clearform_sampling::SamplingError;
use std::fmt::Display;

/// What went wrong. The text names the file, what was expected and found, and what to do.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ClearformError {
    /// The observer cancelled. Nothing was left half-written; samples and training checkpoints stay for resuming.
    #[error("cancelled")]
    Cancelled,
    /// An option that cannot be used.
    #[error("{0}")]
    BadOption(String),
    /// An error, and what it happened to.
    #[error("{context}: {source}")]
    Context {
        /// What was read, written or opened.
        context: String,
        /// What happened.
        source: Box<ClearformError>,
    },
    /// A file or folder cannot be read or written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A file is not JSON, or a report cannot be written as JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// An image cannot be read.
    #[error(transparent)]
    Image(#[from] image::ImageError),
    /// An attention plan or radius is invalid.
    #[error(transparent)]
    Attention(#[from] clearform_attention::AttentionError),
    /// Tensors cannot be read or written.
    #[error(transparent)]
    Weights(#[from] clearform_weights::WeightsError),
    /// The checkpoint is of no known family, or is incomplete.
    #[error(transparent)]
    Layout(Box<clearform_layout::LayoutError>),
    /// A model rejects its input or its weights.
    #[error(transparent)]
    Model(#[from] clearform_models::ModelError),
    /// A plugin, or what it opens, cannot be used.
    #[error(transparent)]
    Plugin(#[from] clearform_plugin_host::PluginError),
    /// The portable model cannot be read or written.
    #[error(transparent)]
    PortableModel(#[from] clearform_portable_model::PortableModelError),
    /// A conversion or a patch failed.
    #[error(transparent)]
    Convert(Box<clearform_convert::ConvertError>),
    /// Distillation failed.
    #[error(transparent)]
    Distill(Box<clearform_distill::DistillError>),
    /// A pipeline cannot be opened or run.
    #[error(transparent)]
    Runtime(Box<clearform_runtime::RuntimeError>),
    /// candle rejects a computation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ClearformError>;

impl From<clearform_convert::ConvertError> for ClearformError {
    fn from(error: clearform_convert::ConvertError) -> Self {
        match error {
            clearform_convert::ConvertError::Cancelled => Self::Cancelled,
            other => Self::Convert(Box::new(other)),
        }
    }
}

impl From<clearform_distill::DistillError> for ClearformError {
    fn from(error: clearform_distill::DistillError) -> Self {
        match error {
            clearform_distill::DistillError::Sampling(clearform_sampling::SamplingError::Cancelled) => Self::Cancelled,
            other => Self::Distill(Box::new(other)),
        }
    }
}

impl From<clearform_runtime::RuntimeError> for ClearformError {
    fn from(error: clearform_runtime::RuntimeError) -> Self {
        match error {
            clearform_runtime::RuntimeError::Sampling(clearform_sampling::SamplingError::Cancelled) => Self::Cancelled,
            other => Self::Runtime(Box::new(other)),
        }
    }
}

impl From<clearform_layout::LayoutError> for ClearformError {
    fn from(error: clearform_layout::LayoutError) -> Self {
        Self::Layout(Box::new(error))
    }
}

impl ClearformError {
    /// [`Self::BadOption`] with this text.
    pub(crate) fn bad_option(text: impl Into<String>) -> Self {
        Self::BadOption(text.into())
    }

    /// The error, or if it is that a result is not finite, the damage to the weights that explains it, if there is any.
    pub(crate) fn or_damage(self, damage: impl FnOnce() -> Option<RuntimeError>) -> Self {
        let is_not_finite = match &self {
            Self::Runtime(error) => {
                matches!(**error, RuntimeError::Sampling(SamplingError::NotFinite { .. }) | RuntimeError::BadImage(_))
            }
            Self::Distill(error) => matches!(
                **error,
                DistillError::Sampling(SamplingError::NotFinite { .. }) | DistillError::NotFinite { .. }
            ),
            _ => false,
        };
        is_not_finite.then(damage).flatten().map_or(self, Self::from)
    }
}

/// Adds what an error happened to.
pub(crate) trait WithContext<T> {
    /// Names the file, model or option.
    fn context(self, context: impl Display) -> Result<T>;
}

impl<T, E: Into<ClearformError>> WithContext<T> for std::result::Result<T, E> {
    fn context(self, context: impl Display) -> Result<T> {
        self.map_err(|error| match error.into() {
            ClearformError::Cancelled => ClearformError::Cancelled,
            error => ClearformError::Context { context: context.to_string(), source: Box::new(error) },
        })
    }
}
