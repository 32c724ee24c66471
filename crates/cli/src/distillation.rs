//! From arguments to samples, and from samples to a trained student: what `convert`, `distill` and `demo` share.

use crate::args::{DeviceArg, TrainingArgs};
use crate::evaluation::prompts_or_classes;
use crate::output::Output;
use crate::sources::device;
use anyhow::{Context as _, bail};
use candle_core::{DType, Tensor};
use clearform_attention::AttentionPlan;
use clearform_distill::{
    Activations, CheckpointDir, ClassifierFree, DistillSettings, Distilled, LearningRate, LossSettings, PairSpec,
    Precision, ResumeMode, SampleSet, SampleSettings, SamplingSpec, TeacherStudent, TrainingOutcome, TrainingProgress,
    distill,
};
use clearform_models::{BatchSpec, Conditions, GuidanceKind, ImageSize};
use clearform_portable_model::DistillationRecord;
use clearform_runtime::{Pipeline, Transformer};
use clearform_weights::{InMemoryTensors, TensorSource};
use std::ops::ControlFlow;
use std::path::Path;

/// Samples that are drawn at once where pictures are small; larger ones are drawn one by one.
const SAMPLES_AT_ONCE: usize = 16;
const SMALL: usize = 256;

/// What a teacher draws of itself when nobody says what.
const PROMPTS: &str = include_str!("prompts.txt");

/// The samples in `folder`: made, finished, or simply there.
pub fn samples(
    pipeline: &Pipeline,
    training: &TrainingArgs,
    folder: &Path,
    output: &Output,
) -> anyhow::Result<SampleSet> {
    let set = SampleSet::create(folder, sample_settings(pipeline, training)?)?;
    if set.is_complete() {
        return Ok(set);
    }
    if pipeline.takes_control() {
        bail!(
            "the transformer draws from a control picture too, and samples are drawn from prompts alone: give --samples"
        );
    }
    let text_ids = encode(pipeline, &set)?;
    let teacher = pipeline.load_transformer(&AttentionPlan::full(), None)?;
    let bar = output.progress("samples", set.settings().count);
    set.draw(teacher.as_ref(), &latent_spec(pipeline, set.settings(), text_ids)?, &mut |done, _| {
        bar.set_position(done as u64)
    })?;
    bar.finish_and_clear();
    Ok(set)
}

/// Encodes the subjects of `set`, and gives the places of text tokens, where the model asks for them.
fn encode(pipeline: &Pipeline, set: &SampleSet) -> anyhow::Result<Option<Tensor>> {
    let mut ids = None;
    let [width, height] = set.settings().size;
    set.encode(&mut |prompts| {
        let encoded = pipeline.encode(prompts)?;
        ids = Some(encoded.text_ids.clone());
        pipeline.add_size_conditions(
            &encoded,
            BatchSpec { size: ImageSize { height, width }, batch: prompts.len(), guidance: 0.0 },
        )
    })?;
    match ids {
        Some(ids) => Ok(ids),
        None => Ok(pipeline.encode(&set.settings().prompts[..1])?.text_ids),
    }
}

/// Samples made before, which must be whole.
pub fn existing_samples(folder: &Path) -> anyhow::Result<SampleSet> {
    let set = SampleSet::open(folder)?;
    if !set.is_complete() {
        bail!("{}: the samples are not finished; run what made them again", folder.display());
    }
    Ok(set)
}

/// Trains a student of `plan` that starts from `start`, and keeps its state in `folder`.
pub fn train(
    teacher: &Transformer,
    student: StudentSpec,
    samples: &SampleSet,
    training: &TrainingArgs,
    output: &Output,
) -> anyhow::Result<TrainedStudent> {
    let weights = InMemoryTensors::load(&teacher.source(), None, &device(training.device)?)?;
    let recipe = PairSpec { family: teacher.family(), config: teacher.config(), plan: student.plan };
    let pair = TeacherStudent::build(recipe, &weights, student.start)?;
    let start = if training.resume { ResumeMode::Resume } else { ResumeMode::Fresh };
    let checkpoint_dir =
        CheckpointDir { folder: student.folder.to_owned(), checkpoint_every: training.checkpoint_every, start };
    let bar = output.progress("distilling", training.steps);
    let mut watch = |progress: &TrainingProgress| {
        bar.set_position(progress.entry.step as u64);
        bar.set_message(format!("loss {:.4}", progress.entry.losses.total));
        ControlFlow::Continue(())
    };
    match distill(&pair, samples, &settings(training), &checkpoint_dir, &mut watch)? {
        TrainingOutcome::Finished(distilled) => {
            bar.finish_and_clear();
            Ok(TrainedStudent { record: record(training, samples, &distilled), distilled })
        }
        TrainingOutcome::Stopped { step } => bail!("distillation stopped at step {step}; go on with --resume"),
    }
}

/// A student that is to be trained.
#[derive(Clone, Copy)]
pub struct StudentSpec<'a> {
    /// Its attention.
    pub plan: &'a AttentionPlan,
    /// Where its trained parameters start: the teacher, or an earlier student.
    pub start: &'a dyn TensorSource,
    /// Where the state of training lies.
    pub folder: &'a Path,
}

/// What training gave.
#[derive(Debug)]
pub struct TrainedStudent {
    /// The trained parameters and every step's losses.
    pub distilled: Distilled,
    /// What the model's record says of it.
    pub record: DistillationRecord,
}

fn sample_settings(pipeline: &Pipeline, training: &TrainingArgs) -> anyhow::Result<SampleSettings> {
    let defaults = pipeline.transformer().identified().variant.defaults;
    let prompts = prompts_or_classes(pipeline, training.prompts.as_deref(), PROMPTS, training.sample_count)?;
    let size = size(pipeline, training);
    let latents = pipeline.initial_latents(0, 1, size)?;
    let embeds_guidance = pipeline.conditions(&Conditions::default(), &latents, 0.0)?.guidance.is_some();
    let scale = defaults.guidance;
    let classifier_free = match pipeline.guidance_kind().clone() {
        guidance_kind if !guidance_kind.guides(scale) => None,
        GuidanceKind::ClassifierFree { without, channels } => Some(ClassifierFree { scale, without, channels }),
        GuidanceKind::Embedded => None,
    };
    Ok(SampleSettings {
        prompts,
        count: training.sample_count,
        batch: if latents.image_tokens <= SMALL { SAMPLES_AT_ONCE } else { 1 },
        size: [size.width, size.height],
        steps: training.sample_steps.unwrap_or(defaults.steps),
        guidance: embeds_guidance.then_some(defaults.guidance),
        classifier_free,
        seed: training.seed,
    })
}

fn size(pipeline: &Pipeline, training: &TrainingArgs) -> ImageSize {
    training.sample_size.map_or(pipeline.native_size(), |edge| ImageSize { height: edge, width: edge })
}

/// Samples are drawn in f32 on a CPU, and on a GPU in what its attention kernels take.
fn latent_spec(
    pipeline: &Pipeline,
    settings: &SampleSettings,
    text_ids: Option<Tensor>,
) -> anyhow::Result<SamplingSpec> {
    let [width, height] = settings.size;
    let latents = pipeline.initial_latents(0, 1, ImageSize { height, width })?;
    let device = latents.tensor.device().clone();
    Ok(SamplingSpec {
        shape: latents.tensor.dims()[1..].to_vec(),
        schedule: pipeline.schedule(settings.steps, &latents)?,
        image_ids: latents.image_ids,
        text_ids,
        dtype: if device.is_cpu() { DType::F32 } else { DType::BF16 },
        device,
    })
}

fn settings(training: &TrainingArgs) -> DistillSettings {
    let learning_rate = LearningRate { peak: training.lr, warmup: (training.steps / 9).min(20), ..Default::default() };
    DistillSettings {
        steps: training.steps,
        batch: training.batch,
        accumulation: training.accumulate,
        learning_rate,
        loss: LossSettings { every: training.attention_every, ..Default::default() },
        seed: training.seed,
        precision: if training.device == DeviceArg::Cpu { Precision::F32 } else { Precision::Bf16 },
        activations: if training.keep_activations { Activations::Keep } else { Activations::Recompute },
        ..Default::default()
    }
}

fn record(training: &TrainingArgs, samples: &SampleSet, distilled: &Distilled) -> DistillationRecord {
    let losses: Vec<f64> = distilled.entries.iter().map(|entry| entry.losses.total).collect();
    let last = &losses[losses.len() - (losses.len() / 10).max(1).min(losses.len())..];
    DistillationRecord {
        steps: training.steps,
        batch: training.batch * training.accumulate,
        learning_rate: training.lr,
        samples: samples.settings().count,
        seed: training.seed,
        first_loss: losses.first().copied().unwrap_or_default(),
        last_loss: last.iter().sum::<f64>() / last.len().max(1) as f64,
    }
}

/// The folder of components, or what to do without one.
pub fn require_components<'a>(components: Option<&'a Path>, missing: &[&str]) -> anyhow::Result<Option<&'a Path>> {
    if missing.is_empty() {
        return Ok(components);
    }
    Err(anyhow::anyhow!("{} are not there", missing.join(", "))).context(
        "distilling makes samples, which needs the whole pipeline: give --components, --samples or --no-distill",
    )
}
