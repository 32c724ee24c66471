//! [`DiffusionConfig`]: noise levels of training and timestep spacing, which diffusers' `DDIMScheduler` and
//! `DPMSolverMultistepScheduler` have in common.

use crate::config::bad;
use crate::schedule::{DataPrediction, linspace};
use crate::{Result, SamplingError};
use clearform_models::{alphas_cumprod, linear_betas};
use serde::Deserialize;

/// The keys of scheduler_config.json that both classes have, with the same defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct DiffusionConfig {
    pub num_train_timesteps: usize,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: BetaSchedule,
    pub prediction_type: Prediction,
    steps_offset: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BetaSchedule {
    Linear,
    ScaledLinear,
}

/// `prediction_type`: what the model predicts.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Prediction {
    /// The noise.
    Epsilon,
    /// x0.
    Sample,
    /// alpha noise - sigma x0 (Salimans and Ho, arXiv 2202.00512).
    #[serde(rename = "v_prediction")]
    Velocity,
}

/// `timestep_spacing`: table 2 of Lin et al., arXiv 2305.08891.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Spacing {
    Leading,
    Linspace,
    Trailing,
}

/// A noise level of DDPM: x = alpha x0 + sigma noise, with alpha² = abar and alpha² + sigma² = 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NoiseLevel {
    pub alpha: f64,
    pub sigma: f64,
}

/// The supported values of the enums above.
pub(crate) const BETA_SCHEDULES: (&str, &[&str]) = ("beta_schedule", &["linear", "scaled_linear"]);
pub(crate) const PREDICTIONS: (&str, &[&str]) = ("prediction_type", &["epsilon", "sample", "v_prediction"]);
pub(crate) const SPACINGS: (&str, &[&str]) = ("timestep_spacing", &["leading", "linspace", "trailing"]);

impl DiffusionConfig {
    /// abar of every training timestep.
    pub(crate) fn alphas_cumprod(&self) -> Vec<f32> {
        let first = self.beta_start;
        let last = self.beta_end;
        let count = self.num_train_timesteps;
        match self.beta_schedule {
            BetaSchedule::Linear => alphas_cumprod(&linear_betas(first, last, count)),
            BetaSchedule::ScaledLinear => {
                let roots = linear_betas(first.sqrt(), last.sqrt(), count);
                alphas_cumprod(&roots.into_iter().map(|root| root * root).collect::<Vec<_>>())
            }
        }
    }

    /// `steps` training timesteps, noisiest first, spaced as if there were `spare` more at the end.
    pub(crate) fn timesteps(&self, spacing: Spacing, steps: usize, spare: usize) -> Result<Vec<usize>> {
        let count = self.num_train_timesteps;
        let points = steps + spare;
        if steps == 0 || points > count {
            let reason = format!("steps: expected 1 to {}, found {steps}", count.saturating_sub(spare));
            return Err(SamplingError::BadSetting(reason));
        }
        let mut timesteps: Vec<usize> = match spacing {
            Spacing::Leading => (0..points).map(|index| index * (count / points) + self.steps_offset).collect(),
            Spacing::Linspace => {
                let even = linspace(0.0, (count - 1) as f64, points);
                even.into_iter().map(|timestep| timestep.round_ties_even() as usize).collect()
            }
            Spacing::Trailing => trailing(count, steps),
        };
        timesteps.reverse();
        timesteps.truncate(steps);
        match timesteps.first().filter(|&&first| first >= count) {
            Some(first) => Err(bad("steps_offset", format!("timestep {first} is outside 0..{count}"))),
            None => Ok(timesteps),
        }
    }

    /// Fails for values that no schedule can be computed from.
    pub(crate) fn check(&self) -> Result<()> {
        if self.num_train_timesteps == 0 {
            return Err(bad("num_train_timesteps", "expected at least 1, found 0"));
        }
        let is_valid = |beta: f64| beta > 0.0 && beta < 1.0;
        if is_valid(self.beta_start) && is_valid(self.beta_end) {
            return Ok(());
        }
        Err(bad("beta_end", "expected beta_start and beta_end between 0 and 1"))
    }
}

impl Default for DiffusionConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            prediction_type: Prediction::Epsilon,
            steps_offset: 0,
        }
    }
}

impl Prediction {
    /// The weights of latents at `level` and prediction whose sum is x0.
    pub(crate) fn data(self, level: NoiseLevel) -> DataPrediction {
        let NoiseLevel { alpha, sigma } = level;
        let (latents, prediction) = match self {
            Self::Epsilon => (1.0 / alpha, -sigma / alpha),
            Self::Sample => (0.0, 1.0),
            Self::Velocity => (alpha, -sigma),
        };
        DataPrediction { latents, prediction, limit: None }
    }

    /// The weights of latents at `level` and prediction whose sum is the noise.
    pub(crate) fn noise(self, level: NoiseLevel) -> (f64, f64) {
        let NoiseLevel { alpha, sigma } = level;
        match self {
            Self::Epsilon => (0.0, 1.0),
            Self::Sample => (1.0 / sigma, -alpha / sigma),
            Self::Velocity => (sigma, alpha),
        }
    }
}

impl NoiseLevel {
    /// The level with alpha² = `abar`.
    pub(crate) fn from_abar(abar: f32) -> Self {
        Self { alpha: f64::from(abar).sqrt(), sigma: (1.0 - f64::from(abar)).sqrt() }
    }

    /// The level with sigma / alpha = `sigma`: diffusers' `_sigma_to_alpha_sigma_t`.
    pub(crate) fn from_sigma(sigma: f32) -> Self {
        let alpha = (f64::from(sigma).powi(2) + 1.0).sqrt().recip();
        Self { alpha, sigma: f64::from(sigma) * alpha }
    }

    /// lambda = ln(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite without noise.
    pub(crate) fn lambda(self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }
}

/// sigma / alpha at `abar`, which diffusers calls sigma. Each operation rounds to f32, as there.
pub(crate) fn sigma(abar: f32) -> f32 {
    ((1.0 - abar) / abar).sqrt()
}

/// `numpy.arange(count, 0, -count / steps).round() - 1`, reversed. numpy's step is the difference of the first two
/// values. For some numbers of steps, rounding gives numpy one more value, -1, which is not a timestep and omitted.
fn trailing(count: usize, steps: usize) -> Vec<usize> {
    let count = count as f64;
    let step = (count - count / steps as f64) - count;
    let value = |index: usize| (count + index as f64 * step).round_ties_even() as usize - 1;
    (0..steps).rev().map(value).collect()
}
