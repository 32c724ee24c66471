//! Generates samples with the teacher and trains a student on them, for `convert`, `distill` and `demo`.

use crate::evaluation::prompts_or_classes;
use crate::observer::{Observer, Progress, Stage};
use crate::{ClearformError, ComputeDevice, Result, TrainingOptions};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_distill::{
    Activations, CheckpointDir, ClassifierFree, DistillSettings, Distilled, LearningRate, LossSettings, PairSpec,
    Precision, ResumeMode, SampleSet, SampleSettings, SamplingSpec, TeacherStudent, TrainingOutcome, TrainingProgress,
    distill,
};
use clearform_models::{BatchSpec, Conditions, GuidanceKind, ImageSize};
use clearform_portable_model::DistillationRecord;
use clearform_runtime::{Pipeline, TransformerCheckpoint, default_dtype};
use clearform_weights::{InMemoryTensors, TensorSource};
use std::path::Path;

/// Samples per batch for images of up to [`SMALL_IMAGE_TOKENS`]. A batch of them still fits where one large image does;
/// larger images are generated one by one.
const SAMPLE_BATCH: usize = 16;
const SMALL_IMAGE_TOKENS: usize = 256;

/// Prompts for samples where the user gives none.
const DEFAULT_PROMPTS: &str = include_str!("prompts.txt");

/// The samples in `folder`; those that are missing there are generated.
///
/// # Errors
/// If the folder holds samples of other settings, or the transformer needs a control image.
pub fn prepare_samples(
    pipeline: &Pipeline,
    training: &TrainingOptions,
    folder: &Path,
    observer: &mut dyn Observer,
) -> Result<SampleSet> {
    let set = SampleSet::create(folder, sample_settings(pipeline, training)?)?;
    if set.is_complete() {
        return Ok(set);
    }
    if pipeline.takes_control() {
        let reason =
            "the transformer needs a control image, but samples are generated from prompts alone; pass --samples";
        return Err(ClearformError::bad_option(reason));
    }
    let text_ids = encode_prompts(pipeline, &set)?;
    let teacher = pipeline.load_transformer(&AttentionPlan::full(), None)?;
    let spec = sampling_spec(pipeline, set.settings(), text_ids)?;
    let mut watch = |done, total| observer.progress(&Progress::new(Stage::Samples, done, total));
    set.generate(teacher.as_ref(), &spec, &mut watch)?;
    Ok(set)
}

/// Encodes the prompts of `set` into its folder. Returns the position ids of the text tokens, if the model takes them.
fn encode_prompts(pipeline: &Pipeline, set: &SampleSet) -> Result<Option<Tensor>> {
    let mut text_ids = None;
    let [width, height] = set.settings().size;
    set.encode(&mut |prompts| {
        let encoded = pipeline.encode(prompts)?;
        text_ids = Some(encoded.text_ids.clone());
        let batch_spec = BatchSpec { size: ImageSize { height, width }, batch: prompts.len(), guidance: 0.0 };
        pipeline.add_size_conditions(&encoded, batch_spec)
    })?;
    match text_ids {
        Some(text_ids) => Ok(text_ids),
        // All prompts were encoded by an earlier run.
        None => Ok(pipeline.encode(&set.settings().prompts[..1])?.text_ids),
    }
}

/// Opens samples from an earlier run.
///
/// # Errors
/// If some of them are missing.
pub fn open_samples(folder: &Path) -> Result<SampleSet> {
    let set = SampleSet::open(folder)?;
    if !set.is_complete() {
        let reason = format!("{}: the samples are incomplete; rerun the command that generated them", folder.display());
        return Err(ClearformError::bad_option(reason));
    }
    Ok(set)
}

/// Checks the settings of the training, before anything is made for it.
///
/// # Errors
/// A setting is out of range.
pub fn check_training(training: &TrainingOptions, device: ComputeDevice) -> Result<()> {
    if training.samples.is_none() && training.sample_count == 0 {
        return Err(ClearformError::bad_option("setting sample_count: expected at least 1, found 0"));
    }
    Ok(distill_settings(training, device).check()?)
}

/// Trains `student` on `samples` against `teacher`.
///
/// # Errors
/// If the device, the weights or the samples cannot be read, or training fails.
pub fn train(
    teacher: &TransformerCheckpoint,
    student: StudentSpec,
    samples: &SampleSet,
    training: &TrainingOptions,
    observer: &mut dyn Observer,
) -> Result<TrainedStudent> {
    let weights = InMemoryTensors::load(&teacher.source(), None, &student.device.open()?)?;
    let spec = PairSpec { architecture: teacher.architecture(), plan: student.plan };
    let pair = TeacherStudent::build(spec, &weights, student.start)?;
    let start = if training.resume { ResumeMode::Resume } else { ResumeMode::Fresh };
    let checkpoint_dir =
        CheckpointDir { folder: student.folder.to_owned(), checkpoint_every: training.checkpoint_every, resume: start };
    let settings = distill_settings(training, student.device);
    let mut watch = |progress: &TrainingProgress| {
        let counted = Progress::new(Stage::Distilling, progress.entry.step, training.steps);
        observer.progress(&Progress { loss: Some(progress.entry.losses.total), ..counted })
    };
    match distill(&pair, samples, &settings, &checkpoint_dir, &mut watch)? {
        TrainingOutcome::Finished(distilled) => {
            Ok(TrainedStudent { record: distillation_record(training, samples, &distilled), distilled })
        }
        TrainingOutcome::Stopped { .. } => Err(ClearformError::Cancelled),
    }
}

/// A student to train.
#[derive(Clone, Copy)]
pub struct StudentSpec<'a> {
    /// Its attention.
    pub plan: &'a AttentionPlan,
    /// Initial values of its trained parameters: the teacher, or an earlier student.
    pub start: &'a dyn TensorSource,
    /// Folder of the training checkpoints.
    pub folder: &'a Path,
    /// Where it is trained.
    pub device: ComputeDevice,
}

/// A student after training.
#[derive(Debug)]
pub struct TrainedStudent {
    /// The trained parameters and every step's losses.
    pub distilled: Distilled,
    /// The entry about the training in the model's record.
    pub record: DistillationRecord,
}

fn sample_settings(pipeline: &Pipeline, training: &TrainingOptions) -> Result<SampleSettings> {
    let defaults = pipeline.transformer().identified().variant.defaults;
    let prompts = prompts_or_classes(pipeline, training.prompts.as_deref(), DEFAULT_PROMPTS, training.sample_count)?;
    let size = sample_size(pipeline, training);
    let latents = pipeline.initial_latents(0, 1, size)?;
    let embeds_guidance = pipeline.conditions(&Conditions::default(), &latents, 0.0)?.guidance.is_some();
    let scale = defaults.guidance;
    let classifier_free = match pipeline.guidance_kind().clone() {
        guidance_kind if !guidance_kind.guides(scale) => None,
        GuidanceKind::ClassifierFree { unconditional, channels } => {
            Some(ClassifierFree { scale, unconditional, channels })
        }
        GuidanceKind::Embedded => None,
    };
    Ok(SampleSettings {
        prompts,
        count: training.sample_count,
        batch: if latents.image_tokens <= SMALL_IMAGE_TOKENS { SAMPLE_BATCH } else { 1 },
        size: [size.width, size.height],
        steps: training.sample_steps.unwrap_or(defaults.steps),
        guidance: embeds_guidance.then_some(defaults.guidance),
        classifier_free,
        seed: training.seed,
    })
}

fn sample_size(pipeline: &Pipeline, training: &TrainingOptions) -> ImageSize {
    training.sample_size.map_or(pipeline.native_size(), |edge| ImageSize { height: edge, width: edge })
}

/// Samples are generated in f32 on a CPU, and in bf16 on a GPU, whose attention kernels take 16-bit values.
fn sampling_spec(pipeline: &Pipeline, settings: &SampleSettings, text_ids: Option<Tensor>) -> Result<SamplingSpec> {
    let [width, height] = settings.size;
    let latents = pipeline.initial_latents(0, 1, ImageSize { height, width })?;
    let device = latents.tensor.device().clone();
    Ok(SamplingSpec {
        shape: latents.tensor.dims()[1..].to_vec(),
        schedule: pipeline.schedule(settings.steps, &latents)?,
        image_ids: latents.image_ids,
        text_ids,
        dtype: default_dtype(&device),
        device,
    })
}

fn distill_settings(training: &TrainingOptions, device: ComputeDevice) -> DistillSettings {
    // Short runs warm up for a ninth of their steps, so that most steps train at the full rate.
    let learning_rate =
        LearningRate { peak: training.learning_rate, warmup: (training.steps / 9).min(20), ..Default::default() };
    DistillSettings {
        steps: training.steps,
        batch: training.batch,
        accumulation: training.accumulate,
        learning_rate,
        loss: LossSettings { every: training.attention_every, ..Default::default() },
        seed: training.seed,
        precision: if device == ComputeDevice::Cpu { Precision::F32 } else { Precision::Bf16 },
        activations: if training.keep_activations { Activations::Keep } else { Activations::Recompute },
        ..Default::default()
    }
}

fn distillation_record(training: &TrainingOptions, samples: &SampleSet, distilled: &Distilled) -> DistillationRecord {
    let losses: Vec<f64> = distilled.entries.iter().map(|entry| entry.losses.total).collect();
    // The last tenth of the steps: the loss of a single batch is noisy.
    let last = &losses[losses.len() - (losses.len() / 10).max(1).min(losses.len())..];
    DistillationRecord {
        steps: training.steps,
        batch: training.batch * training.accumulate,
        learning_rate: training.learning_rate,
        samples: samples.settings().count,
        seed: training.seed,
        first_loss: losses.first().copied().unwrap_or_default(),
        last_loss: last.iter().sum::<f64>() / last.len().max(1) as f64,
    }
}

/// Checks that samples can be generated: that no component of the pipeline is missing.
///
/// # Errors
/// If `missing` is not empty; the message names the ways out.
pub fn require_components(missing: &[&str]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    Err(ClearformError::bad_option(format!(
        "missing components: {}; distillation generates samples and needs the whole pipeline: pass --components, \
         --samples or --no-distill",
        missing.join(", ")
    )))
}
