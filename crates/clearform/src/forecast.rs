//! [`Forecast`]: what a distillation gains and what it takes, said before it starts.

use crate::observer::Observer;
use crate::recipe::{ModelSize, ResolvedTraining};
use crate::window_gain::{WindowGain, pairs};
use crate::{ComputeDevice, Result, TrainingOptions};
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::{Identified, attention_parameters, evaluation_teraflop};
use clearform_models::{InputSizes, random_input};
use clearform_runtime::TransformerCheckpoint;
use clearform_weights::{TensorInfo, TensorSource as _};
use std::fmt;
use std::time::{Duration, Instant};

/// What a distillation gains, and about what it takes. Times are for a CPU only.
#[derive(Debug, Clone)]
pub struct Forecast {
    gain: WindowGain,
    sampling: Option<Duration>,
    training: Option<Duration>,
    /// Peak memory of the training, in bytes.
    memory: f64,
}

/// Time of a training step for each sample, in evaluations of the teacher: its own, the student's, and the backward,
/// which computes gradients of all activations and of few weights. Measured on mini-dit and mini-flux.
const STEP_EVALUATIONS: f64 = 3.3;

/// The same where activations are recomputed.
const RECOMPUTED_EVALUATIONS: f64 = 4.3;

/// Share of the rate of a product of large matrices that an evaluation of a large model reaches.
const RATE_SHARE: f64 = 0.7;

/// Values of four bytes that a block holds for each token and each channel of its width, forward and backward.
const ACTIVATIONS: f64 = 60.0;

/// The same where the activations of every block are kept, so that backward adds those of one block alone. Measured on
/// mini-dit and mini-flux.
const KEPT_ACTIVATIONS: f64 = 36.0;

/// Memory of the program itself, in bytes.
const PROGRAM: f64 = 26e6;

/// Bytes of a trained parameter: its f32 master, gradient and two moments.
const TRAINED_BYTES: f64 = 16.0;

/// What makes a training take less memory.
const MEMORY_ADVICE: &str = "pass a smaller --batch or --sample-size, or allow more with --max-memory";

/// Above this time the forecast says what else could be done.
const LONG: Duration = Duration::from_secs(4 * 3600);

impl Forecast {
    /// The forecast of `training` a student of `transformer` with the attention of `plan`.
    ///
    /// # Errors
    /// The model cannot be built.
    pub fn new(
        transformer: &TransformerCheckpoint,
        plan: &AttentionPlan,
        training: &ResolvedTraining,
        device: ComputeDevice,
    ) -> Result<Self> {
        let identified = transformer.identified();
        let pixels = training.size;
        let grid = training.grid;
        let pixels = pixels.height * pixels.width;
        let text = training.model.text_tokens;
        let full = || evaluation_teraflop(identified, grid.tokens(), pixels, text, pairs(grid));
        let evaluation = match device {
            ComputeDevice::Cpu if training.model.is_small() => Some(timed_evaluation(transformer, training)?),
            ComputeDevice::Cpu => full().map(|teraflop| Duration::from_secs_f64(teraflop / measured_rate())),
            ComputeDevice::Cuda(_) => None,
        };
        let step = if training.keeps_activations(device) { STEP_EVALUATIONS } else { RECOMPUTED_EVALUATIONS };
        let evaluations = |count: f64| evaluation.map(|time| time.mul_f64(count));
        Ok(Self {
            gain: WindowGain::new(identified, plan, grid, pixels, text),
            sampling: evaluations(training.sampling_evaluations(identified.variant.defaults)),
            training: evaluations(training.trained_samples() * step).map(|time| within(time, &training.options)),
            memory: training_memory(
                identified,
                &transformer.source().tensors(),
                TrainingBatch {
                    model: training.model,
                    samples: training.recipe.batch,
                    image_tokens: grid.tokens(),
                    keeps_activations: training.keeps_activations(device),
                },
            ),
        })
    }

    /// What the user should know before it starts.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = vec![self.to_string()];
        notes.extend(self.gain.warnings());
        let time = self.sampling.unwrap_or_default() + self.training.unwrap_or_default();
        if time > LONG {
            notes.push(
                "this takes long here. What works at this size: an attention patch that somebody has distilled (patch \
                 apply), fewer steps and samples (--steps, --sample-count), smaller samples (--sample-size), or a GPU"
                    .to_owned(),
            );
        }
        notes
    }
}

/// The time of a training that would take `time`, if the options limit it.
fn within(time: Duration, options: &TrainingOptions) -> Duration {
    match options.time.map(Duration::from_secs_f64) {
        Some(limit) if options.until_flat => time.min(limit),
        Some(limit) => limit,
        None => time,
    }
}

/// Tells the observer the forecast's notes, and refuses a training that does not fit into memory.
///
/// # Errors
/// [`RuntimeError::NotEnoughMemory`](clearform_runtime::RuntimeError::NotEnoughMemory).
pub fn announce(
    forecast: &Forecast,
    training: &ResolvedTraining,
    device: ComputeDevice,
    observer: &mut dyn Observer,
) -> Result<()> {
    forecast.notes().iter().for_each(|message| observer.note(message));
    if training.options.attention_every.is_some() && training.recipe.loss.attention == 0.0 {
        observer.note("--attention-every has no effect: the loss of attention outputs has the weight 0 (--losses)");
    }
    match device {
        ComputeDevice::Cuda(_) => Ok(()),
        ComputeDevice::Cpu => Ok(training.options.memory.check("training", forecast.memory as u64, MEMORY_ADVICE)?),
    }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gain, sampling, training, memory } = self;
        write!(f, "{gain}")?;
        if let (Some(sampling), Some(training)) = (sampling, training) {
            f.write_str("; about ")?;
            if !sampling.is_zero() {
                write!(f, "{} for samples and ", rounded(*sampling))?;
            }
            write!(f, "{} for training", rounded(*training))?;
        }
        let (memory, unit) = if *memory < 1e9 { (memory / 1e6, "MB") } else { (memory / 1e9, "GB") };
        write!(f, "; about {memory:.*} {unit} of memory", if unit == "GB" { 1 } else { 0 })
    }
}

/// A time in the unit that a person would use.
fn rounded(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let units = [("weeks", 604_800.0), ("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)];
    match units.into_iter().find(|(_, unit)| seconds >= 2.0 * unit) {
        Some((name, unit)) => format!("{:.0} {name}", seconds / unit),
        None => format!("{seconds:.0} s"),
    }
}

/// Time of an evaluation of one sample of a small model, where every thread evaluates another sample.
fn timed_evaluation(transformer: &TransformerCheckpoint, training: &ResolvedTraining) -> Result<Duration> {
    let (grid, text) = (training.grid, training.model.text_tokens);
    let denoiser = transformer.build(&AttentionPlan::full(), Some(DType::F32), &Device::Cpu)?;
    let sizes = InputSizes { grid, text, dtype: DType::F32, device: Device::Cpu };
    let input = random_input(transformer.architecture(), &sizes)?;
    let mut times: Vec<Duration> = Vec::new();
    // The first warms up, which a long one does not need.
    while times.len() < 4 && times.iter().sum::<Duration>() < Duration::from_secs(1) {
        let begun = Instant::now();
        denoiser.forward(&input)?;
        times.push(begun.elapsed());
    }
    Ok(times.into_iter().min().unwrap_or_default() / rayon::current_num_threads() as u32)
}

/// 10^12 operations a second of this machine in large models: most of the rate of a large product.
fn measured_rate() -> f64 {
    const EDGE: usize = 1024;
    let product = || -> candle_core::Result<f64> {
        let matrix = Tensor::ones((EDGE, EDGE), DType::F32, &Device::Cpu)?;
        let begun = Instant::now();
        matrix.matmul(&matrix)?;
        Ok(2.0 * (EDGE as f64).powi(3) / begun.elapsed().as_secs_f64() / 1e12)
    };
    let rates = (0..3).filter_map(|_| product().ok());
    RATE_SHARE * rates.fold(f64::MIN_POSITIVE, f64::max)
}

/// What memory depends on in a training, besides the weights.
#[derive(Clone, Copy)]
pub struct TrainingBatch {
    /// The size of the model.
    pub model: ModelSize,
    /// Samples per batch.
    pub samples: usize,
    /// Image tokens of a sample.
    pub image_tokens: usize,
    /// Whether activations are kept rather than recomputed.
    pub keeps_activations: bool,
}

/// About the most memory in bytes that the training of a model with these `tensors` takes: weights as they are stored,
/// what is kept for each trained parameter, the largest weight in f32 while it is used, and the activations of the
/// samples that run at a time.
pub fn training_memory(identified: &Identified, tensors: &[TensorInfo], batch: TrainingBatch) -> f64 {
    let TrainingBatch { model, samples, image_tokens, keeps_activations } = batch;
    let weights: u64 = tensors.iter().map(TensorInfo::byte_count).sum();
    let largest = tensors.iter().map(TensorInfo::element_count).max().unwrap_or(0);
    let samples = if model.is_small() { rayon::current_num_threads().min(samples) } else { samples };
    let depth: usize = identified.depths().values().sum();
    let (blocks, values) = if keeps_activations { (depth, KEPT_ACTIVATIONS) } else { (1, ACTIVATIONS) };
    let tokens = image_tokens + model.text_tokens;
    let activations = (samples * blocks * tokens * model.width * 4) as f64 * values;
    PROGRAM + weights as f64 + TRAINED_BYTES * attention_parameters(identified) + 4.0 * largest as f64 + activations
}
