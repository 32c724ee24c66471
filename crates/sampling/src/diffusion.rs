//! [`DiffusionConfig`]: the noise levels of training, and how steps are spread over them, as diffusers' DDIMScheduler and
//! DPMSolverMultistepScheduler share it. It knows neither's steps.

use crate::config::bad;
use crate::schedule::{DataPrediction, linspace};
use crate::{Result, SamplingError};
use clearform_models::{alphas_cumprod, linear_betas};
use serde::Deserialize;

/// The keys of scheduler_config.json that both have, with the defaults of both.
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

/// What the model predicts: the noise, x0, or alpha noise - sigma x0.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Prediction {
    Epsilon,
    Sample,
    #[serde(rename = "v_prediction")]
    Velocity,
}

/// Table 2 of Lin et al., arXiv 2305.08891.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Spacing {
    Leading,
    Linspace,
    Trailing,
}

/// x = alpha x0 + sigma noise.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NoiseLevel {
    pub alpha: f64,
    pub sigma: f64,
}

/// The words of the keys above.
pub(crate) const BETA_SCHEDULES: (&str, &[&str]) = ("beta_schedule", &["linear", "scaled_linear"]);
pub(crate) const PREDICTIONS: (&str, &[&str]) = ("prediction_type", &["epsilon", "sample", "v_prediction"]);
pub(crate) const SPACINGS: (&str, &[&str]) = ("timestep_spacing", &["leading", "linspace", "trailing"]);

impl DiffusionConfig {
    /// abar of every training step.
    pub(crate) fn alphas_cumprod(&self) -> Vec<f32> {
        let (first, last, count) = (self.beta_start, self.beta_end, self.num_train_timesteps);
        match self.beta_schedule {
            BetaSchedule::Linear => alphas_cumprod(&linear_betas(first, last, count)),
            BetaSchedule::ScaledLinear => {
                let roots = linear_betas(first.sqrt(), last.sqrt(), count);
                alphas_cumprod(&roots.into_iter().map(|root| root * root).collect::<Vec<_>>())
            }
        }
    }

    /// The training steps that `steps` steps stand on, from the noisiest. They are spread as if `spare` more followed.
    pub(crate) fn timesteps(&self, spacing: Spacing, steps: usize, spare: usize) -> Result<Vec<usize>> {
        let (count, points) = (self.num_train_timesteps, steps + spare);
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
            Some(first) => Err(bad("steps_offset", format!("timestep {first} lies outside of 0..{count}"))),
            None => Ok(timesteps),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.num_train_timesteps == 0 {
            return Err(bad("num_train_timesteps", "expected at least 1, found 0"));
        }
        let within = |beta: f64| beta > 0.0 && beta < 1.0;
        if within(self.beta_start) && within(self.beta_end) {
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
    /// x0, of latents at `level` and the prediction.
    pub(crate) fn data(self, level: NoiseLevel) -> DataPrediction {
        let NoiseLevel { alpha, sigma } = level;
        let (latents, prediction) = match self {
            Self::Epsilon => (1.0 / alpha, -sigma / alpha),
            Self::Sample => (0.0, 1.0),
            Self::Velocity => (alpha, -sigma),
        };
        DataPrediction { latents, prediction, limit: None }
    }

    /// The noise likewise, as weights of latents and prediction.
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
    /// The level of signal `abar`.
    pub(crate) fn of_signal(abar: f32) -> Self {
        Self { alpha: f64::from(abar).sqrt(), sigma: (1.0 - f64::from(abar)).sqrt() }
    }

    /// The level where noise over signal is `ratio`.
    pub(crate) fn of_ratio(ratio: f32) -> Self {
        let alpha = (f64::from(ratio).powi(2) + 1.0).sqrt().recip();
        Self { alpha, sigma: f64::from(ratio) * alpha }
    }

    /// lambda, half of the logarithm of the signal-to-noise ratio; infinite without noise.
    pub(crate) fn lambda(self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }
}

/// Noise over signal where the signal is `abar`, each operation in f32 as in diffusers.
pub(crate) fn ratio(abar: f32) -> f32 {
    ((1.0 - abar) / abar).sqrt()
}

/// `numpy.arange(count, 0, -count / steps).round() - 1`, turned round. numpy's gap is that of the first two values; for
/// some numbers of steps its rounding overruns to a step more, at -1, which no model knows and we leave out.
fn trailing(count: usize, steps: usize) -> Vec<usize> {
    let count = count as f64;
    let gap = (count - count / steps as f64) - count;
    let value = |index: usize| (count + index as f64 * gap).round_ties_even() as usize - 1;
    (0..steps).rev().map(value).collect()
}
