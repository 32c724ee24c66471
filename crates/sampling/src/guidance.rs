//! [`Guidance`]: the conditions of an image, and classifier-free guidance.

use crate::{Result, SamplingError};
use candle_core::Tensor;
use clearform_models::{Conditions, Denoiser, DenoiserInput, StepIndex, without_variance};

/// How conditions and guidance scale determine the prediction.
#[derive(Debug, Clone)]
pub enum Guidance {
    /// One forward per step. A scale that the model embeds is in [`Conditions::guidance`].
    SingleEvaluation(Conditions),
    /// Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): two forwards per step.
    ClassifierFree {
        /// Conditions of the prompt.
        positive: Conditions,
        /// Conditions of the negative or unconditional prompt.
        negative: Conditions,
        /// Guidance scale: the prediction is negative + scale · (positive - negative).
        scale: f64,
        /// Number of guided channels (dimension 1), counted from the first. The others are those of the positive
        /// prediction. `None` guides all.
        channels: Option<usize>,
    },
}

impl Guidance {
    /// Classifier-free guidance as in diffusers' pipelines: only with a negative prompt and a scale above 1.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`] for a scale that is not finite.
    pub fn new(positive: Conditions, negative: Option<Conditions>, scale: f64) -> Result<Self> {
        check(scale)?;
        Ok(match negative {
            Some(negative) if scale > 1.0 => Self::ClassifierFree { positive, negative, scale, channels: None },
            _ => Self::SingleEvaluation(positive),
        })
    }

    /// Guides only the first `guided` channels, if a number is given. A single evaluation has none to guide.
    #[must_use]
    pub fn with_channels(self, guided: Option<usize>) -> Self {
        match self {
            Self::ClassifierFree { positive, negative, scale, .. } => {
                Self::ClassifierFree { positive, negative, scale, channels: guided }
            }
            single => single,
        }
    }

    /// Classifier-free guidance at any scale. A scale of 1 is the positive prediction and needs one forward only.
    /// `channels`: the original code of DiT and SiT guides the first three of four, diffusers guides all.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`] for a scale that is not finite.
    pub fn classifier_free(
        positive: Conditions,
        negative: Conditions,
        scale: f64,
        channels: Option<usize>,
    ) -> Result<Self> {
        check(scale)?;
        Ok(if scale == 1.0 {
            Self::SingleEvaluation(positive)
        } else {
            Self::ClassifierFree { positive, negative, scale, channels }
        })
    }

    /// The guided prediction. A learned variance (DiT, PixArt) is dropped: see [`without_variance`].
    ///
    /// # Shapes
    /// latents as the model takes them, timestep (batch) -> as latents.
    ///
    /// # Errors
    /// The model fails, or there are fewer channels than guided ones.
    pub fn predict(
        &self,
        denoiser: &dyn Denoiser,
        latents: &Tensor,
        timestep: &Tensor,
        step_index: StepIndex,
    ) -> Result<Tensor> {
        let input = |conditions: &Conditions| DenoiserInput {
            latents: latents.clone(),
            timestep: timestep.clone(),
            step_index,
            conditions: conditions.clone(),
        };
        match self {
            Self::SingleEvaluation(conditions) => {
                Ok(without_variance(&denoiser.forward(&input(conditions))?, latents)?)
            }
            Self::ClassifierFree { positive, negative, scale, channels } => {
                let predictions = denoiser.forward_each(&[input(positive), input(negative)])?;
                let [positive, negative] = [0, 1].map(|index| without_variance(&predictions[index], latents));
                match channels {
                    None => extrapolate(&positive?, &negative?, *scale),
                    Some(channels) => extrapolate_channels(*channels, &positive?, &negative?, *scale),
                }
            }
        }
    }
}

fn check(scale: f64) -> Result<()> {
    if scale.is_finite() {
        return Ok(());
    }
    Err(SamplingError::BadSetting(format!("guidance: expected a finite number, found {scale}")))
}

/// negative + scale (positive - negative).
fn extrapolate(positive: &Tensor, negative: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((negative + ((positive - negative)? * scale)?)?)
}

/// As [`extrapolate`] in the first `channels` channels, and `positive` in the others.
fn extrapolate_channels(channels: usize, positive: &Tensor, negative: &Tensor, scale: f64) -> Result<Tensor> {
    let all = positive.dims().get(1).copied().unwrap_or(0);
    if channels == 0 || channels > all {
        return Err(SamplingError::BadSetting(format!("guided channels: expected 1 to {all}, found {channels}")));
    }
    let first = extrapolate(&positive.narrow(1, 0, channels)?, &negative.narrow(1, 0, channels)?, scale)?;
    Ok(Tensor::cat(&[first, positive.narrow(1, channels, all - channels)?], 1)?)
}
