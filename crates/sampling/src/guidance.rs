//! [`Guidance`]: what a picture is conditioned on, and how strongly. It knows no schedule.

use crate::{Result, SamplingError};
use candle_core::Tensor;
use clearform_models::{Conditions, Denoiser, DenoiserInput, Moment};

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
    },
}

impl Guidance {
    /// Classifier-free guidance as FluxPipeline does it: only with a scale above 1.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`] for a scale that is not finite.
    pub fn new(positive: Conditions, negative: Option<Conditions>, scale: f64) -> Result<Self> {
        if !scale.is_finite() {
            return Err(SamplingError::BadSetting(format!("guidance: expected a finite number, found {scale}")));
        }
        Ok(match negative {
            Some(negative) if scale > 1.0 => Self::ClassifierFree { positive, negative, scale },
            _ => Self::Embedded(positive),
        })
    }

    /// The guided prediction.
    ///
    /// # Shapes
    /// latents as the model takes them, timestep (batch); the result as latents.
    ///
    /// # Errors
    /// The model refused.
    pub fn predict(
        &self,
        denoiser: &dyn Denoiser,
        latents: &Tensor,
        timestep: &Tensor,
        moment: Moment,
    ) -> Result<Tensor> {
        let evaluate = |conditions: &Conditions| {
            let (latents, timestep) = (latents.clone(), timestep.clone());
            denoiser.forward(&DenoiserInput { latents, timestep, moment, conditions: conditions.clone() })
        };
        match self {
            Self::Embedded(conditions) => Ok(evaluate(conditions)?),
            Self::ClassifierFree { positive, negative, scale } => {
                let (wanted, unwanted) = (evaluate(positive)?, evaluate(negative)?);
                Ok((&unwanted + ((wanted - &unwanted)? * *scale)?)?)
            }
        }
    }
}
