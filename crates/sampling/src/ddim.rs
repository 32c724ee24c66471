//! [`Ddim`]: diffusers' `DDIMScheduler` with eta = 0 (Song et al., arXiv 2010.02502).

use crate::config::{AcceptedKeys, bad, class};
use crate::diffusion::{BETA_SCHEDULES, DiffusionConfig, NoiseLevel, PREDICTIONS, SPACINGS, Spacing, sigma};
use crate::schedule::{DataPrediction, StepCoefficients};
use crate::{Result, Schedule};
use clearform_models::NoiseProcess;
use serde::Deserialize;
use serde_json::Value;

/// diffusers' `DDIMScheduler` without added noise. Absent keys of its config have the defaults of the class.
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
    choices: &[BETA_SCHEDULES, PREDICTIONS, SPACINGS],
};

impl Ddim {
    /// Reads scheduler_config.json. As in diffusers, keys that the class does not have are ignored.
    ///
    /// # Errors
    /// [`crate::SamplingError::BadScheduler`] for another scheduler class, an option that is not supported, or a value
    /// of the wrong type.
    pub fn from_config(config: &Value) -> Result<Self> {
        let ddim: Self = ACCEPTED.read(config)?;
        ddim.diffusion.check()?;
        if ddim.clip_sample && !(ddim.clip_sample_range.is_finite() && ddim.clip_sample_range > 0.0) {
            return Err(bad("clip_sample_range", "expected a number above 0"));
        }
        Ok(ddim)
    }

    /// The config of facebook/DiT-XL-2-256: x0 is not clipped, as it is latents and not pixels in -1..1.
    pub fn for_latents() -> Self {
        Self { clip_sample: false, ..Self::default() }
    }

    /// `set_timesteps(steps)`, with the coefficients of each step.
    ///
    /// # Errors
    /// [`crate::SamplingError::BadSetting`] for 0 steps, or more than the training timesteps.
    pub fn schedule(&self, steps: usize) -> Result<Schedule> {
        let abar = self.diffusion.alphas_cumprod();
        let timesteps = self.diffusion.timesteps(self.timestep_spacing, steps, 0)?;
        let stride = self.diffusion.num_train_timesteps / steps;
        let last = if self.set_alpha_to_one { 1.0 } else { abar[0] };
        // As in diffusers, a step ends one stride below its timestep, even if the next step starts elsewhere.
        let next_abar = |timestep: usize| timestep.checked_sub(stride).map_or(last, |below| abar[below]);
        let coefficients = |&timestep: &usize| {
            self.step(NoiseLevel::from_abar(abar[timestep]), NoiseLevel::from_abar(next_abar(timestep)))
        };
        let steps = timesteps.iter().map(coefficients).collect();
        let end = timesteps.last().map_or(last, |&timestep| next_abar(timestep));
        let sigmas = timesteps.iter().map(|&timestep| sigma(abar[timestep])).chain([sigma(end)]).collect();
        let timesteps = timesteps.into_iter().map(|timestep| timestep as f32).collect();
        Schedule::new(NoiseProcess::Ddpm, sigmas, timesteps, steps)
    }

    /// Equation 12 with eta = 0: x' = alpha' x0 + sigma' noise. x0 is clipped if the config says so; the noise is not
    /// recomputed from it.
    fn step(&self, now: NoiseLevel, next: NoiseLevel) -> StepCoefficients {
        let prediction = self.diffusion.prediction_type;
        let limit = self.clip_sample.then_some(self.clip_sample_range);
        let (latents_weight, prediction_weight) = prediction.noise(now);
        StepCoefficients {
            estimate: Some(DataPrediction { limit, ..prediction.data(now) }),
            latents: next.sigma * latents_weight,
            data: next.alpha,
            prediction: next.sigma * prediction_weight,
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
    fn unsupported_options_are_refused_by_name() {
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
        let error = Ddim::from_config(&json!({"clip_sample": "no"})).unwrap_err().to_string();
        assert!(error.contains("invalid type"), "{error}");
    }

    #[test]
    fn more_steps_than_training_timesteps_are_refused() {
        let offset = Ddim::from_config(&json!({"steps_offset": 60})).unwrap();
        for (ddim, steps, part) in [
            (Ddim::default(), 0, "expected 1 to 1000, found 0"),
            (Ddim::default(), 1001, "expected 1 to 1000, found 1001"),
            (offset, 20, "timestep 1010 is outside 0..1000"),
        ] {
            let found = ddim.schedule(steps).unwrap_err().to_string();
            assert!(found.contains(part), "{found}");
        }
    }
}
