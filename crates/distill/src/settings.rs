//! [`DistillSettings`]: how a student is trained. The settings are recorded in the training state.

use crate::{DistillError, Result};
use candle_core::Device;
use clearform_ops::has_bf16_products;
use clearform_weights::ProductPrecision;
use serde::{Deserialize, Serialize};
use std::fmt::Display;

/// How a student is trained. A training can only be resumed with the settings it was started with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillSettings {
    /// Optimizer steps; 1000.
    pub steps: usize,
    /// Whether the training ends when the error on held-out samples is flat; then [`Self::steps`] is the most. The
    /// learning rate stays at its peak until then, and decays over a last quarter of the steps.
    #[serde(skip_serializing_if = "is_false")]
    pub until_flat: bool,
    /// Samples in one backward pass; 8.
    pub batch: usize,
    /// Backward passes whose mean gradient makes one step; 1.
    pub accumulation: usize,
    /// The optimizer; AdamW.
    pub optimizer: Optimizer,
    /// Learning rate and its schedule.
    pub learning_rate: LearningRate,
    /// Largest common norm of all gradients; 1. `None` does not clip.
    pub clip: Option<f64>,
    /// Decay of a moving average of the weights, which then becomes the result; no average by default.
    pub ema: Option<f64>,
    /// Distribution of noise levels; uniform, as in CLEAR.
    pub timesteps: Timesteps,
    /// The loss.
    pub loss: LossSettings,
    /// Precision of activations and products; f32. Trained parameters and losses are always f32.
    pub precision: Precision,
    /// Whether backward recomputes activations or keeps them; recompute.
    pub activations: Activations,
    /// Seed of the choice of samples, of noise levels and of noise; 0.
    pub seed: u64,
}

/// L = denoising · mean((v − target)²) + prediction · mean((v − v_teacher)²) + attention · mean over the watched
/// layers of mean((a − a_teacher)²) (CLEAR, equation 6). Here a is the output of attention before its output projection,
/// and the target is what a perfect model predicts: noise − x₀ for flow matching, the noise for DDPM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossSettings {
    /// Weight of the denoising loss; 1. Training states of earlier versions call it `flow`.
    #[serde(alias = "flow")]
    pub denoising: f64,
    /// Weight of the teacher's prediction; 0.5.
    pub prediction: f64,
    /// Weight of the teacher's attention outputs; 0.5.
    pub attention: f64,
    /// Every how many layers one is watched, starting with the first; 4. In models with single-stream layers only these
    /// are counted.
    pub every: usize,
    /// The watched layers by name; overrides `every`.
    pub layers: Option<Vec<String>>,
}

/// Distribution of the noise level t between 0 (data) and 1 (noise).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Timesteps {
    /// Uniform.
    Uniform,
    /// The logistic function of a normally distributed value (Stable Diffusion 3, arXiv 2403.03206, section 3.1).
    LogitNormal {
        /// Mean of that value; above 0 means more noise.
        mean: f64,
        /// Its standard deviation.
        deviation: f64,
    },
}

/// What happens to a block's activations between forward and backward. The result is the same bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// They are recomputed: memory holds those of one block.
    Recompute,
    /// They are kept, so each block runs once: memory grows with the depth.
    Keep,
}

/// Precision of activations and products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    F32,
    /// bfloat16: on a GPU activations are held in it, on a CPU they are f32 and rounded to it where they are multiplied,
    /// if the processor does that faster.
    Bf16,
}

impl Precision {
    /// Whether `device` computes otherwise in it than in f32.
    pub fn has_effect_on(self, device: &Device) -> bool {
        self == Self::Bf16 && (!device.is_cpu() || has_bf16_products())
    }

    /// How f32 activations are multiplied.
    pub fn products(self) -> ProductPrecision {
        match self {
            Self::F32 => ProductPrecision::Full,
            Self::Bf16 => ProductPrecision::Bf16,
        }
    }
}

/// Learning rate and its schedule.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LearningRate {
    /// The highest rate; 6e-4.
    pub peak: f64,
    /// Steps of linear warmup; 20.
    pub warmup: usize,
    /// How the rate falls; half a cosine to 0.02 of the peak.
    pub decay: Decay,
}

/// Decay of the learning rate over all steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// No decay.
    Constant,
    /// Half a cosine wave from the peak down to `floor` times the peak.
    Cosine {
        /// Fraction of the peak at the end.
        floor: f64,
    },
}

/// How gradients become steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    /// Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as `torch.optim.AdamW`.
    AdamW {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        epsilon: f64,
        /// Weight decay; each step applies it times the learning rate.
        weight_decay: f64,
    },
    /// Plain gradient descent.
    Sgd,
}

impl Default for DistillSettings {
    fn default() -> Self {
        Self {
            steps: 1000,
            until_flat: false,
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

/// Those of the prototype of this distillation: no weight decay, and a shorter memory than torch's beta2 of 0.999, which
/// averages over about as many steps as the default training has.
impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

impl DistillSettings {
    /// Checks every setting's range.
    ///
    /// # Errors
    /// [`DistillError::BadSetting`] names the first setting that is out of range.
    pub fn check(&self) -> Result<()> {
        at_least_one("steps", self.steps)?;
        at_least_one("batch", self.batch)?;
        at_least_one("accumulation", self.accumulation)?;
        at_least_one("loss.every", self.loss.every)?;
        self.loss.check()?;
        let peak = self.learning_rate.peak;
        let clip = self.clip.unwrap_or(1.0);
        let ema = self.ema.unwrap_or(0.0);
        if !peak.is_finite() || peak <= 0.0 {
            return out_of_range("learning_rate.peak", "a number above 0", peak);
        }
        if clip.is_nan() || clip <= 0.0 {
            return out_of_range("clip", "a number above 0", clip);
        }
        if !(0.0..1.0).contains(&ema) {
            return out_of_range("ema", "a number in 0..1", ema);
        }
        Ok(())
    }
}

/// Settings that are off are not written, so that earlier versions read them.
fn is_false(value: &bool) -> bool {
    !value
}

impl LossSettings {
    /// Checks that something is learnt.
    fn check(&self) -> Result<()> {
        let weights = [self.denoising, self.prediction, self.attention];
        let is_usable = weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0);
        match is_usable && weights.iter().any(|weight| *weight > 0.0) {
            true => Ok(()),
            false => out_of_range("loss", "weights of 0 or more, of which one is above 0", format_args!("{weights:?}")),
        }
    }

    /// Indices into `layers` (all layers of the model, in order) of the watched ones, whose attention outputs are compared:
    /// the named layers, else one of every [`Self::every`] single-stream layers, or of all layers if none is single-stream.
    ///
    /// # Errors
    /// The model does not have a named layer.
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

/// Refuses a count of 0.
pub(crate) fn at_least_one(key: &'static str, count: usize) -> Result<()> {
    if count > 0 { Ok(()) } else { out_of_range(key, "at least 1", count) }
}

fn out_of_range(key: &'static str, expected: &str, found: impl Display) -> Result<()> {
    Err(DistillError::BadSetting { key, reason: format!("expected {expected}, found {found}") })
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
    fn every_nth_single_stream_layer_is_watched() {
        let watched = |loss: LossSettings| loss.watched(&layers()).unwrap();
        assert_eq!(watched(LossSettings::default()), [2, 6]);
        assert_eq!(watched(LossSettings { every: 2, ..Default::default() }), [2, 4, 6]);
        assert!(watched(LossSettings { attention: 0.0, ..Default::default() }).is_empty());
        let named = LossSettings { layers: Some(vec!["transformer_blocks.1.attn".to_owned()]), ..Default::default() };
        assert_eq!(named.watched(&layers()).unwrap(), [1]);
        assert!(named.watched(&layers()[..1]).unwrap_err().to_string().contains("transformer_blocks.1.attn"));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        assert!(DistillSettings::default().check().is_ok());
        let nothing = LossSettings { denoising: 0.0, prediction: 0.0, attention: 0.0, ..Default::default() };
        for (key, settings) in [
            ("steps", DistillSettings { steps: 0, ..Default::default() }),
            ("batch", DistillSettings { batch: 0, ..Default::default() }),
            ("clip", DistillSettings { clip: Some(f64::NAN), ..Default::default() }),
            ("ema", DistillSettings { ema: Some(1.0), ..Default::default() }),
            (
                "loss",
                DistillSettings { loss: LossSettings { prediction: -1.0, ..Default::default() }, ..Default::default() },
            ),
            ("loss", DistillSettings { loss: nothing, ..Default::default() }),
        ] {
            let error = settings.check().unwrap_err().to_string();
            assert!(error.starts_with(&format!("setting {key}: expected")), "{error}");
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

    #[test]
    fn the_old_name_of_the_denoising_loss_is_read() {
        let read = |json| serde_json::from_str::<LossSettings>(json);
        let expected = LossSettings { denoising: 0.25, ..LossSettings::default() };
        assert_eq!(read("{\"flow\": 0.25}").unwrap(), expected);
        assert_eq!(read("{\"denoising\": 0.25}").unwrap(), expected);
        assert!(read("{\"flow\": 0.25, \"denoising\": 0.5}").unwrap_err().to_string().contains("duplicate"));
    }
}
