//! What can go wrong between noise and latents.

/// Errors of this crate.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SamplingError {
    /// scheduler_config.json asks for what is not supported, or makes no sense.
    #[error("scheduler_config.json, key {key:?}: {reason}")]
    BadScheduler {
        /// The key.
        key: &'static str,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// A setting that no schedule or guidance can be made of.
    #[error("{0}")]
    BadSetting(String),
    /// A saved random state that no generator has.
    #[error("saved random state: {0}")]
    BadState(String),
    /// The model's prediction holds NaN or infinity.
    #[error(
        "step {step} of {steps}: the model's prediction is not finite. Likely causes: damaged weights, or a number \
         format too narrow for this model; check the file with `verify`, or try --dtype f32"
    )]
    NotFinite {
        /// The step, counted from 1.
        step: usize,
        /// How many there are.
        steps: usize,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] clearform_models::ModelError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, SamplingError>;
