//! [`DistillSettings`]: how a student is trained, as a value that is recorded with what it made.

use crate::{DistillError, Result};
use serde::{Deserialize, Serialize};

/// How a student is trained. A checkpoint can only be resumed with the settings it was begun with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillSettings {
    /// Optimizer steps; 1000.
    pub steps: usize,
    /// Samples in one backward pass; 8.
    pub batch: usize,
    /// Backward passes whose mean gradient makes one step; 1.
    pub accumulation: usize,
    /// Which optimizer; AdamW.
    pub optimizer: Optimizer,
    /// How far it steps.
    pub learning_rate: LearningRate,
    /// Largest norm of all gradients together; 1. None leaves them.
    pub clip: Option<f64>,
    /// Decay of a moving average of the weights, which is then what comes out; none by default.
    pub ema: Option<f64>,
    /// Where noise levels come from; uniform, as CLEAR.
    pub timesteps: Timesteps,
    /// What is minimised.
    pub loss: LossSettings,
    /// Number format of activations; f32. Trained parameters and losses are f32 in any case.
    pub precision: Precision,
    /// What happens to activations between forward and backward; they are computed again.
    pub activations: Activations,
    /// Seed of sample choice, noise levels and noise; 0.
    pub seed: u64,
}

/// L = flow · mean((v − target)²) + prediction · mean((v − v_teacher)²) + attention · mean over the watched
/// layers of mean((a − a_teacher)²) (CLEAR, equation 6), with a the output of attention before its projection, and the
/// target what a perfect model predicts, noise − x₀ for a flow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossSettings {
    /// Weight of flow matching; 1.
    pub denoising: f64,
    /// Weight of the teacher's prediction; 0.5.
    pub prediction: f64,
    /// Weight of the teacher's attention outputs; 0.5.
    pub attention: f64,
    /// Every how many-th layer is watched, from the first on; 4. Where there are single-stream layers, of those.
    pub every: usize,
    /// The watched layers by name, in place of `every`.
    pub layers: Option<Vec<String>>,
}

/// Distribution of the noise level t in 0..1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Timesteps {
    /// Every level alike.
    Uniform,
    /// The logistic function of a normal number (Stable Diffusion 3, section 3.1).
    LogitNormal {
        /// Mean of the normal number; above 0 means more noise.
        mean: f64,
        /// Its standard deviation.
        deviation: f64,
    },
}

/// What happens to a block's activations between forward and backward. The result is the same to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// They are computed again: memory holds those of one block.
    Recompute,
    /// They are kept, which saves running each block twice: memory grows with the depth.
    Keep,
}

/// Number format of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    F32,
    /// bfloat16: half the memory of activations.
    Bf16,
}

/// How far each step goes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LearningRate {
    /// The highest; 6e-4.
    pub peak: f64,
    /// Steps over which it rises to the peak; 20.
    pub warmup: usize,
    /// What it does besides.
    pub decay: Decay,
}

/// Fall of the learning rate over all steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// It does not fall.
    Constant,
    /// Half a cosine wave from the peak down to `floor` times the peak.
    Cosine {
        /// Share of the peak that is left at the end.
        floor: f64,
    },
}

/// Rule by which gradients become steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    /// Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as `torch.optim.AdamW`.
    AdamW {
        /// Decay of the mean of gradients.
        beta1: f64,
        /// Decay of the mean of their squares.
        beta2: f64,
        /// Added to the root of the latter.
        epsilon: f64,
        /// Weight decay, times the learning rate.
        weight_decay: f64,
    },
    /// Plain gradient descent.
    Sgd,
}

impl Default for DistillSettings {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch: 8,
            accumulation: 1,
            optimizer: Optimizer::default(),
            learning_rate: LearningRate::default(),
            clip: Some(1.0),
            ema: None,
            timesteps: Timesteps::Uniform,
            loss: LossSettings::default(),
            precision: Precision::F32,
            activations: Activations::Recompute,
            seed: 0,
        }
    }
}

impl Default for LossSettings {
    fn default() -> Self {
        Self { denoising: 1.0, prediction: 0.5, attention: 0.5, every: 4, layers: None }
    }
}

impl Default for LearningRate {
    fn default() -> Self {
        Self { peak: 6e-4, warmup: 20, decay: Decay::Cosine { floor: 0.02 } }
    }
}

/// The defaults of the prototype that CLEAR's distillation was tried with: no weight decay, a short memory.
impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

impl DistillSettings {
    /// Refuses what nothing can be trained with.
    ///
    /// # Errors
    /// [`DistillError::BadSetting`], which names the setting.
    pub fn check(&self) -> Result<()> {
        let positive = |key, count: usize| ensure(key, count > 0, || format!("expected at least 1, found {count}"));
        positive("steps", self.steps)?;
        positive("batch", self.batch)?;
        positive("accumulation", self.accumulation)?;
        positive("loss.every", self.loss.every)?;
        let peak = self.learning_rate.peak;
        ensure("learning_rate.peak", peak.is_finite() && peak > 0.0, || {
            format!("expected a number above 0, found {peak}")
        })?;
        let clip = self.clip.unwrap_or(1.0);
        ensure("clip", clip > 0.0, || format!("expected a number above 0, found {clip}"))?;
        let ema = self.ema.unwrap_or(0.0);
        ensure("ema", (0.0..1.0).contains(&ema), || format!("expected a number in 0..1, found {ema}"))
    }
}

impl LossSettings {
    /// Indices in `layers` (all of the model, in order) of those whose attention outputs are compared: the named ones,
    /// or every so many-th single-stream layer, or of all layers where no layer is single-stream.
    ///
    /// # Errors
    /// A named layer that the model does not have.
    pub(crate) fn watched(&self, layers: &[String]) -> Result<Vec<usize>> {
        if self.attention == 0.0 {
            return Ok(Vec::new());
        }
        if let Some(names) = &self.layers {
            return names.iter().map(|name| find(layers, name)).collect();
        }
        let single: Vec<usize> = (0..layers.len()).filter(|&index| layers[index].starts_with("single_")).collect();
        let all = if single.is_empty() { (0..layers.len()).collect() } else { single };
        Ok(all.into_iter().step_by(self.every).collect())
    }
}

fn find(layers: &[String], name: &str) -> Result<usize> {
    let found = layers.iter().position(|layer| layer == name);
    found.ok_or_else(|| DistillError::BadSetting {
        key: "loss.layers",
        reason: format!("the model has no layer {name:?}; the first of its {} is {:?}", layers.len(), layers.first()),
    })
}

fn ensure(key: &'static str, holds: bool, reason: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(DistillError::BadSetting { key, reason: reason() }) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn layers() -> Vec<String> {
        let double = (0..2).map(|index| format!("transformer_blocks.{index}.attn"));
        double.chain((0..6).map(|index| format!("single_transformer_blocks.{index}.attn"))).collect()
    }

    #[test]
    fn every_kth_single_layer_is_watched() {
        let watched = |loss: LossSettings| loss.watched(&layers()).unwrap();
        assert_eq!(watched(LossSettings::default()), [2, 6]);
        assert_eq!(watched(LossSettings { every: 2, ..Default::default() }), [2, 4, 6]);
        assert!(watched(LossSettings { attention: 0.0, ..Default::default() }).is_empty());
        let named = LossSettings { layers: Some(vec!["transformer_blocks.1.attn".to_owned()]), ..Default::default() };
        assert_eq!(named.watched(&layers()).unwrap(), [1]);
        assert!(named.watched(&layers()[..1]).unwrap_err().to_string().contains("transformer_blocks.1.attn"));
    }

    #[test]
    fn what_cannot_be_trained_with_is_refused() {
        assert!(DistillSettings::default().check().is_ok());
        for (key, settings) in [
            ("steps", DistillSettings { steps: 0, ..Default::default() }),
            ("batch", DistillSettings { batch: 0, ..Default::default() }),
            ("clip", DistillSettings { clip: Some(f64::NAN), ..Default::default() }),
            ("ema", DistillSettings { ema: Some(1.0), ..Default::default() }),
        ] {
            assert!(settings.check().unwrap_err().to_string().contains(key), "{key}");
        }
    }

    #[test]
    fn settings_read_back_from_json() {
        let settings =
            DistillSettings { timesteps: Timesteps::LogitNormal { mean: 0.5, deviation: 1.0 }, ..Default::default() };
        let json = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<DistillSettings>(&json).unwrap(), settings);
        assert_eq!(serde_json::from_str::<DistillSettings>("{}").unwrap(), DistillSettings::default());
        assert!(serde_json::from_str::<DistillSettings>("{\"step\": 3}").is_err());
    }
}
