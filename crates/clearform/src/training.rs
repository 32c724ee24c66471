//! Trains a student on samples and judges it, for `convert`, `distill` and `demo`.

use crate::judge::{Judge, Verdict, harm, warning};
use crate::live_report::LiveReport;
use crate::observer::{Observer, Progress, Stage, StandingProgress, note};
use crate::recipe::ResolvedTraining;
use crate::training_samples::TrainingSamples;
use crate::{ClearformError, ComputeDevice, Result};
use clearform_attention::AttentionPlan;
use clearform_distill::{
    CheckpointDir, DistillSettings, Distilled, PairSpec, Precision, ResumeMode, SampleSet, TeacherStudent,
    TrainingData, TrainingOutcome, TrainingProgress, distill, recorded_settings, steps_within,
};
use clearform_portable_model::DistillationRecord;
use clearform_runtime::TransformerCheckpoint;
use clearform_weights::{InMemoryTensors, TensorSource};
use std::ops::ControlFlow;
use std::path::Path;

/// Trains `student` on `samples` against `teacher`, and judges it on those that are held out.
///
/// # Errors
/// If the device, the weights or the samples cannot be read, or training fails.
pub fn train(
    teacher: &TransformerCheckpoint,
    student: StudentSpec,
    samples: &TrainingSamples,
    training: &ResolvedTraining,
    observer: &mut dyn Observer,
) -> Result<TrainedStudent> {
    let device = student.device.open()?;
    let weights = InMemoryTensors::load(&teacher.source(), None, &device)?;
    let mut settings = training.settings(student.device);
    if settings.precision == Precision::Bf16 && !settings.precision.has_effect_on(&device) {
        note(observer, "--precision bf16 has no effect: this processor multiplies bf16 no faster than f32");
    }
    let products = settings.precision.products();
    let spec = PairSpec { architecture: teacher.architecture(), plan: student.plan, products };
    let original = teacher.source();
    let build = |start: &dyn TensorSource| TeacherStudent::build(spec, &weights, start);
    let pair = build(student.earlier.unwrap_or(&original))?;
    // The errors before are those of an undistilled student, also of one that goes on from an earlier training.
    let judge = |held_out| {
        let undistilled = student.earlier.map(|_| build(&original)).transpose()?;
        Judge::new(undistilled.as_ref().unwrap_or(&pair), held_out, student.folder, observer)
    };
    let judge = samples.held_out.as_ref().map(judge).transpose()?;
    let goes_on = judge.as_ref().filter(|_| student.earlier.is_some());
    let error_at_start = goes_on.map(|judge| judge.error_of(&pair, observer)).transpose()?;
    let start = if training.options.resume { ResumeMode::Resume } else { ResumeMode::Fresh };
    let checkpoint_every = training.options.checkpoint_every;
    let checkpoint_dir = CheckpointDir { folder: student.folder.to_owned(), checkpoint_every, resume: start };
    if let Some(seconds) = training.options.time {
        // A resumed training goes on with the steps that it began with.
        settings.steps = match recorded_settings(&checkpoint_dir)? {
            Some(recorded) => recorded.steps,
            None => steps_within(seconds, &pair, &samples.samples, &settings)?,
        };
        note(observer, format_args!("{} steps fit into the time", settings.steps));
    }
    let data = TrainingData { samples: &samples.samples, held_out: judge.as_ref().map(Judge::held_out) };
    let images_every = training.images_every(settings.steps);
    let report = LiveReport::new(student.folder, judge.as_ref(), images_every);
    note(observer, format_args!("what the training does is shown in {}", report.path().display()));
    let mut watcher = TrainingWatcher { models: &pair, report, held_out: None, failed: None };
    let outcome = distill(&pair, data, &settings, &checkpoint_dir, &mut |progress| watcher.observe(progress, observer));
    let outcome = outcome.map_err(|error| ClearformError::from(error).or_damage(|| teacher.damage()))?;
    if let Some(error) = watcher.failed {
        return Err(error);
    }
    let TrainingOutcome::Finished(distilled) = outcome else { return Err(ClearformError::Cancelled) };
    let verdict = judge.map(|judge| judge.verdict(&pair, observer)).transpose()?;
    if let Some(Verdict { record, .. }) = &verdict {
        let warnings = [warning(record, distilled.steps), harm(error_at_start, record.error_after)];
        warnings.iter().flatten().for_each(|warning| observer.note(warning));
    }
    let record = DistillationRecord {
        attention: Some(student.plan.to_string()),
        verdict: verdict.as_ref().map(|verdict| verdict.record.clone()),
        ..distillation_record(&settings, &samples.samples, &distilled)
    };
    Ok(TrainedStudent { distilled, record, verdict, prompts: named_prompts(&samples.samples) })
}

/// The first of the prompts, which the model's README.md names.
fn named_prompts(samples: &SampleSet) -> Vec<String> {
    /// How many of them.
    const NAMED: usize = 4;
    samples.settings().prompts.iter().take(NAMED).map(ToString::to_string).collect()
}

/// Passes the progress of a training on, to the user and to the live report.
struct TrainingWatcher<'a> {
    models: &'a TeacherStudent,
    report: LiveReport<'a>,
    /// The held-out error when it was last measured.
    held_out: Option<f64>,
    /// Why the report could not be written, which stops the training.
    failed: Option<ClearformError>,
}

impl TrainingWatcher<'_> {
    fn observe(&mut self, progress: &TrainingProgress<'_>, observer: &mut dyn Observer) -> ControlFlow<()> {
        let entry = progress.entry;
        self.held_out = entry.held_out.or(self.held_out);
        let counted = Progress::new(Stage::Distilling, entry.step, progress.steps);
        let shown = Progress { loss: Some(entry.losses.total), held_out: self.held_out, ..counted };
        if let Err(error) = self.report.update(self.models, progress, &mut StandingProgress { observer, shown }) {
            self.failed = Some(error);
            return ControlFlow::Break(());
        }
        observer.progress(&shown)
    }
}

/// A student to train.
#[derive(Clone, Copy)]
pub struct StudentSpec<'a> {
    /// Its attention.
    pub plan: &'a AttentionPlan,
    /// An earlier student, which it goes on from; `None` begins with the teacher's weights.
    pub earlier: Option<&'a dyn TensorSource>,
    /// Folder of the training checkpoints.
    pub folder: &'a Path,
    /// Where it is trained.
    pub device: ComputeDevice,
}

/// A student after training.
pub struct TrainedStudent {
    /// The trained parameters and every step's losses.
    pub distilled: Distilled,
    /// The entry about the training in the model's record.
    pub record: DistillationRecord,
    /// How near it is to the teacher; `None` if no samples were held out.
    pub verdict: Option<Verdict>,
    /// Some of the prompts or classes that it was trained on.
    pub prompts: Vec<String>,
}

fn distillation_record(settings: &DistillSettings, samples: &SampleSet, distilled: &Distilled) -> DistillationRecord {
    let losses: Vec<f64> = distilled.entries.iter().map(|entry| entry.losses.total).collect();
    // The last tenth of the steps: the loss of a single batch is noisy.
    let last = &losses[losses.len() - (losses.len() / 10).max(1).min(losses.len())..];
    DistillationRecord {
        attention: None,
        steps: distilled.steps,
        earlier_steps: 0,
        batch: settings.batch * settings.accumulation,
        learning_rate: settings.learning_rate.peak,
        losses: Some([settings.loss.denoising, settings.loss.prediction, settings.loss.attention]),
        samples: samples.settings().count,
        sample_size: Some(samples.settings().size),
        sample_steps: Some(samples.settings().steps),
        seed: settings.seed,
        first_loss: losses.first().copied().unwrap_or_default(),
        last_loss: last.iter().sum::<f64>() / last.len().max(1) as f64,
        verdict: None,
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
