//! [`SamplingError`]: errors of schedulers, guidance and the denoising loop.

/// Errors of this crate.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SamplingError {
    /// scheduler_config.json, which the caller knows, has an option that is not supported, or an invalid value.
    #[error("key {key:?}: {reason}")]
    BadScheduler {
        /// The key.
        key: &'static str,
        /// What was expected and found, and the remedy.
        reason: String,
    },
    /// A setting from which no schedule or guidance can be made.
    #[error("{0}")]
    BadSetting(String),
    /// The model's prediction contains NaN or infinity.
    #[error(
        "step {step} of {steps}: the model's prediction contains NaN or infinity. Likely causes: damaged weights, an \
         adapter that is too strong, or a dtype too narrow for this model; f32, on a CPU, has the largest range"
    )]
    NotFinite {
        /// The step, counted from 1.
        step: usize,
        /// Number of steps.
        steps: usize,
    },
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The model failed.
    #[error(transparent)]
    Model(#[from] clearform_models::ModelError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, SamplingError>;
