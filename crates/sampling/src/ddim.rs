//! [`Ddim`]: the steps of denoising diffusion implicit models (Song et al., arXiv 2010.02502) without added noise, as
//! diffusers' `DDIMScheduler` makes them. It knows no model.

use crate::config::{AcceptedKeys, bad, class};
use crate::diffusion::{BETA_SCHEDULES, DiffusionConfig, NoiseLevel, PREDICTIONS, SPACINGS, Spacing, ratio};
use crate::schedule::{DataPrediction, StepCoefficients};
use crate::{Result, Schedule};
use clearform_models::NoiseProcess;
use serde::Deserialize;
use serde_json::Value;

/// scheduler_config.json, with the defaults of the diffusers class.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Ddim {
    #[serde(flatten)]
    diffusion: DiffusionConfig,
    clip_sample: bool,
    clip_sample_range: f64,
    set_alpha_to_one: bool,
    timestep_spacing: Spacing,
}

const ACCEPTED: AcceptedKeys = AcceptedKeys {
    class: class::DDIM,
    unsupported: &["rescale_betas_zero_snr", "thresholding", "trained_betas"],
    words: &[BETA_SCHEDULES, PREDICTIONS, SPACINGS],
};

impl Ddim {
    /// Reads scheduler_config.json. Keys of diffusers that are not for this class of schedule are ignored, as there.
    ///
    /// # Errors
    /// [`crate::SamplingError::BadScheduler`] for another scheduler class, an option that is not supported and set, or
    /// a value of the wrong kind.
    pub fn from_config(config: &Value) -> Result<Self> {
        let ddim: Self = ACCEPTED.read(config)?;
        ddim.diffusion.check()?;
        if ddim.clip_sample && !(ddim.clip_sample_range.is_finite() && ddim.clip_sample_range > 0.0) {
            return Err(bad("clip_sample_range", "expected a number above 0"));
        }
        Ok(ddim)
    }

    /// As facebook's DiT is published: the estimates of latents are not clipped.
    pub fn for_latents() -> Self {
        Self { clip_sample: false, ..Self::default() }
    }

    /// The noise levels for `steps` steps.
    ///
    /// # Errors
    /// [`crate::SamplingError::BadSetting`] for no step at all, or more than were trained.
    pub fn schedule(&self, steps: usize) -> Result<Schedule> {
        let abar = self.diffusion.alphas_cumprod();
        let timesteps = self.diffusion.timesteps(self.timestep_spacing, steps, 0)?;
        let stride = self.diffusion.num_train_timesteps / steps;
        let last = if self.set_alpha_to_one { 1.0 } else { abar[0] };
        // What a step goes to is a stride below, whatever the next step stands on: so diffusers has it.
        let next = |timestep: usize| timestep.checked_sub(stride).map_or(last, |below| abar[below]);
        let one =
            |&timestep: &usize| self.step(NoiseLevel::of_signal(abar[timestep]), NoiseLevel::of_signal(next(timestep)));
        let rules = timesteps.iter().map(one).collect();
        let end = timesteps.last().map_or(last, |&timestep| next(timestep));
        let sigmas = timesteps.iter().map(|&timestep| ratio(abar[timestep])).chain([ratio(end)]).collect();
        let timesteps = timesteps.into_iter().map(|timestep| timestep as f32).collect();
        Schedule::new(NoiseProcess::Ddpm, sigmas, timesteps, rules)
    }

    /// Equation 12 with sigma 0: x' = alpha' x0 + sigma' noise, x0 clipped and the noise not.
    fn step(&self, now: NoiseLevel, next: NoiseLevel) -> StepCoefficients {
        let prediction = self.diffusion.prediction_type;
        let limit = self.clip_sample.then_some(self.clip_sample_range);
        let (of_latents, of_prediction) = prediction.noise(now);
        StepCoefficients {
            estimate: Some(DataPrediction { limit, ..prediction.data(now) }),
            latents: next.sigma * of_latents,
            data: next.alpha,
            prediction: next.sigma * of_prediction,
            previous: 0.0,
        }
    }
}

impl Default for Ddim {
    fn default() -> Self {
        Self {
            diffusion: DiffusionConfig::default(),
            clip_sample: true,
            clip_sample_range: 1.0,
            set_alpha_to_one: true,
            timestep_spacing: Spacing::Leading,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SamplingError;
    use serde_json::json;

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (key, value) in [
            ("thresholding", json!(true)),
            ("trained_betas", json!([0.1, 0.2])),
            ("rescale_betas_zero_snr", json!(true)),
            ("beta_schedule", json!("squaredcos_cap_v2")),
            ("prediction_type", json!("flow_prediction")),
            ("timestep_spacing", json!("even")),
            ("clip_sample_range", json!(0.0)),
            ("num_train_timesteps", json!(0)),
            ("beta_end", json!(1.5)),
            ("_class_name", json!("DDPMScheduler")),
        ] {
            let found = Ddim::from_config(&json!({key: value})).unwrap_err();
            assert!(matches!(found, SamplingError::BadScheduler { key: named, .. } if named == key), "{key}: {found}");
        }
        assert!(Ddim::from_config(&json!({"clip_sample": "no"})).is_err());
    }

    #[test]
    fn steps_that_were_not_trained_are_refused() {
        let offset = Ddim::from_config(&json!({"steps_offset": 60})).unwrap();
        for (ddim, steps, part) in [
            (Ddim::default(), 0, "expected 1 to 1000, found 0"),
            (Ddim::default(), 1001, "expected 1 to 1000, found 1001"),
            (offset, 20, "timestep 1010 lies outside of 0..1000"),
        ] {
            let found = ddim.schedule(steps).unwrap_err().to_string();
            assert!(found.contains(part), "{found}");
        }
    }
}
