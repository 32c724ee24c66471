//! [`Guidance`]: what a picture is conditioned on, and how strongly. It knows no schedule.

use crate::{Result, SamplingError};
use candle_core::Tensor;
use clearform_models::{Conditions, Denoiser, DenoiserInput, StepIndex, without_variance};

/// How the conditions steer the prediction.
#[derive(Debug, Clone)]
pub enum Guidance {
    /// One evaluation a step. A scale, if the model embeds one, lies in [`Conditions::guidance`].
    Embedded(Conditions),
    /// Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): two evaluations a step.
    ClassifierFree {
        /// What the picture shall be.
        positive: Conditions,
        /// What it shall not be.
        negative: Conditions,
        /// How far to go from the negative prediction through the positive one; 1 is the positive one.
        scale: f64,
        /// How many channels (dimension 1) are guided; the others are the positive prediction's. None guides all.
        channels: Option<usize>,
    },
}

impl Guidance {
    /// Classifier-free guidance as FluxPipeline does it: only with a scale above 1.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`] for a scale that is not finite.
    pub fn new(positive: Conditions, negative: Option<Conditions>, scale: f64) -> Result<Self> {
        check(scale)?;
        Ok(match negative {
            Some(negative) if scale > 1.0 => Self::ClassifierFree { positive, negative, scale, channels: None },
            _ => Self::Embedded(positive),
        })
    }

    /// Classifier-free guidance at any scale; only at 1, where the positive prediction comes out, with one evaluation.
    /// facebook's DiT and SiT guide the first three of four `channels`, diffusers guides all.
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
            Self::Embedded(positive)
        } else {
            Self::ClassifierFree { positive, negative, scale, channels }
        })
    }

    /// The guided prediction. Of a model that predicts more channels than latents have, as DiT and PixArt do, which
    /// learned the variance too, only as many of the first as latents have.
    ///
    /// # Shapes
    /// latents as the model takes them, timestep (batch); the result as latents.
    ///
    /// # Errors
    /// The model refused; more guided channels than there are.
    pub fn predict(
        &self,
        denoiser: &dyn Denoiser,
        latents: &Tensor,
        timestep: &Tensor,
        step_index: StepIndex,
    ) -> Result<Tensor> {
        let evaluate = |conditions: &Conditions| {
            let input = DenoiserInput {
                latents: latents.clone(),
                timestep: timestep.clone(),
                step_index: step_index,
                conditions: conditions.clone(),
            };
            Ok(without_variance(&denoiser.forward(&input)?, latents)?)
        };
        match self {
            Self::Embedded(conditions) => evaluate(conditions),
            Self::ClassifierFree { positive, negative, scale, channels: None } => {
                guided(&evaluate(positive)?, &evaluate(negative)?, *scale)
            }
            Self::ClassifierFree { positive, negative, scale, channels: Some(channels) } => {
                let (wanted, unwanted) = (evaluate(positive)?, evaluate(negative)?);
                guided_first(*channels, &wanted, &unwanted, *scale)
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

fn guided(wanted: &Tensor, unwanted: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((unwanted + ((wanted - unwanted)? * scale)?)?)
}

fn guided_first(channels: usize, wanted: &Tensor, unwanted: &Tensor, scale: f64) -> Result<Tensor> {
    let all = wanted.dims().get(1).copied().unwrap_or(0);
    if channels == 0 || channels > all {
        return Err(SamplingError::BadSetting(format!("guided channels: expected 1 to {all}, found {channels}")));
    }
    let first = guided(&wanted.narrow(1, 0, channels)?, &unwanted.narrow(1, 0, channels)?, scale)?;
    Ok(Tensor::cat(&[first, wanted.narrow(1, channels, all - channels)?], 1)?)
}
