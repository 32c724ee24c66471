//! [`distill`]: the training loop. Everything that it needs to resume is in one file, which is written at intervals.

use crate::backward::add_gradients;
use crate::learning_rate::{DecaySteps, is_flat};
use crate::loss_log::LossLog;
use crate::training_state::{LOSS_FILE, ResumeRequirements, StateMetadata, TrainingState};
use crate::{
    Batches, DistillError, DistillSettings, Gradients, HeldOut, LossEntry, Losses, OptimizerState, Result, SampleSet,
    TeacherStudent, backward, clip_gradients,
};
use candle_core::Tensor;
use clearform_sampling::TorchGenerator;
use clearform_weights::InMemoryTensors;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where training keeps its files: `training.safetensors` and `losses.jsonl`.
#[derive(Debug, Clone)]
pub struct CheckpointDir {
    /// The folder; it is created if it does not exist.
    pub folder: PathBuf,
    /// Steps between checkpoints. One is always written at the end.
    pub checkpoint_every: usize,
    /// What to do with a checkpoint that exists.
    pub resume: ResumeMode,
}

/// What to do with an earlier checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeMode {
    /// There must be none.
    Fresh,
    /// Continue from it, bit for bit as without the interruption; start from the beginning if there is none.
    Resume,
}

/// Passed to the observer after each step.
#[derive(Debug, Clone, Copy)]
pub struct TrainingProgress<'a> {
    /// The step's entry in the loss log.
    pub entry: LossEntry,
    /// Those of all steps so far.
    pub entries: &'a [LossEntry],
    /// Steps in all; the most, while it is open how many there will be.
    pub steps: usize,
    /// Time left, estimated from the mean time of the steps of this run.
    pub left: Duration,
}

/// How a run of [`distill`] ended.
#[derive(Debug)]
pub enum TrainingOutcome {
    /// All steps are done.
    Finished(Distilled),
    /// The observer stopped it, and a checkpoint was written.
    Stopped {
        /// Steps done.
        step: usize,
    },
}

/// A trained student.
#[derive(Debug)]
pub struct Distilled {
    /// Trained parameters by canonical name, f32: the moving average if there is one, else the masters. The student has
    /// them too.
    pub tensors: InMemoryTensors,
    /// Number of optimizer steps.
    pub steps: usize,
    /// The loss log.
    pub entries: Vec<LossEntry>,
    /// Seconds of training, over all runs.
    pub seconds: f64,
}

/// What a student is trained and judged on.
#[derive(Clone, Copy)]
pub struct TrainingData<'a> {
    /// The samples of the training.
    pub samples: &'a SampleSet,
    /// Samples that are not trained on. The student's error on them is logged about twenty times.
    pub held_out: Option<&'a HeldOut>,
}

/// How often the held-out error is measured during a training.
pub const EVALUATIONS: usize = 20;

/// The same where its end depends on it, by the most steps that it may have.
const OPEN_EVALUATIONS: usize = 80;

/// Trains the student of `models` on `data`. `observe` is called after each step and may stop the training.
///
/// # Errors
/// A setting is out of range, the folder contains a training that must not be resumed or has other settings, or a loss is
/// not finite.
pub fn distill(
    models: &TeacherStudent,
    data: TrainingData<'_>,
    settings: &DistillSettings,
    checkpoint_dir: &CheckpointDir,
    observe: &mut dyn FnMut(&TrainingProgress<'_>) -> ControlFlow<()>,
) -> Result<TrainingOutcome> {
    settings.check()?;
    if settings.until_flat && data.held_out.is_none() {
        return Err(DistillError::BadSetting { key: "until_flat", reason: "needs held-out samples".to_owned() });
    }
    let mut training = TrainingRun::begin(models, data, settings, checkpoint_dir)?;
    let start = Instant::now();
    let first = training.metadata.step;
    let earlier = training.metadata.seconds;
    while training.metadata.step < training.decay().end {
        let mut entry = training.step()?;
        entry.seconds = earlier + start.elapsed().as_secs_f64();
        training.metadata.seconds = entry.seconds;
        entry.held_out = training.held_out_share()?;
        training.loss_log.add(entry)?;
        training.notice_flat();
        let steps = training.decay().end;
        let left = start.elapsed() * (steps - entry.step) as u32 / (entry.step - first) as u32;
        let control = observe(&TrainingProgress { entry, entries: training.loss_log.entries(), steps, left });
        let is_last = entry.step == steps;
        if control.is_break() || is_last || entry.step.is_multiple_of(checkpoint_dir.checkpoint_every.max(1)) {
            training.save()?;
        }
        if control.is_break() && !is_last {
            return Ok(TrainingOutcome::Stopped { step: entry.step });
        }
    }
    training.finish().map(TrainingOutcome::Finished)
}

/// The settings of the training in `checkpoint_dir` that would be resumed; `None` if there is none.
///
/// # Errors
/// A file that is not a training state.
pub fn recorded_settings(checkpoint_dir: &CheckpointDir) -> Result<Option<DistillSettings>> {
    let path = checkpoint_dir.folder.join(STATE_FILE);
    let is_resumed = checkpoint_dir.resume == ResumeMode::Resume && path.exists();
    if is_resumed { TrainingState::recorded_settings(&path).map(Some) } else { Ok(None) }
}

/// The number of steps of `settings` that fit into `seconds`, by the time of a few trial steps, which train nothing; at
/// least one.
///
/// # Errors
/// Errors of a step.
pub fn steps_within(
    seconds: f64,
    models: &TeacherStudent,
    samples: &SampleSet,
    settings: &DistillSettings,
) -> Result<usize> {
    let mut batches = Batches::new(samples, settings, models, TorchGenerator::new(settings.seed))?;
    let mut shortest = f64::INFINITY;
    for _ in 0..TRIAL_STEPS {
        let batch = batches.draw()?;
        let begun = Instant::now();
        backward(models, &batch, &settings.loss, settings.activations)?;
        shortest = shortest.min(begun.elapsed().as_secs_f64());
    }
    Ok(((seconds / (shortest * settings.accumulation as f64)) as usize).max(1))
}

/// Steps by which the time of a step is estimated. The first warms up.
const TRIAL_STEPS: usize = 3;

/// Name of the training state in its folder.
const STATE_FILE: &str = "training.safetensors";

struct TrainingRun<'a> {
    models: &'a TeacherStudent,
    settings: &'a DistillSettings,
    batches: Batches<'a>,
    held_out: Option<&'a HeldOut>,
    optimizer: OptimizerState,
    average: BTreeMap<String, Tensor>,
    metadata: StateMetadata,
    requirements: ResumeRequirements,
    loss_log: LossLog,
    path: PathBuf,
}

impl<'a> TrainingRun<'a> {
    fn begin(
        models: &'a TeacherStudent,
        data: TrainingData<'a>,
        settings: &'a DistillSettings,
        checkpoint_dir: &CheckpointDir,
    ) -> Result<Self> {
        let TrainingData { samples, held_out } = data;
        let folder = &checkpoint_dir.folder;
        std::fs::create_dir_all(folder).map_err(|source| DistillError::Io { path: folder.clone(), source })?;
        let path = folder.join(STATE_FILE);
        let requirements = ResumeRequirements {
            settings: settings.clone(),
            samples: samples.settings().clone(),
            models: models.fingerprint().to_owned(),
        };
        let state = match (path.exists(), checkpoint_dir.resume) {
            (true, ResumeMode::Resume) => resumed_state(&path, models, requirements)?,
            (true, ResumeMode::Fresh) => {
                let reason = "an earlier training exists; pass --resume to continue it, or delete it".to_owned();
                return Err(DistillError::BadFile { path, reason });
            }
            (false, _) => first_state(models, requirements)?,
        };
        let TrainingState { metadata, requirements, average, optimizer, losses, .. } = state;
        let batches = Batches::new(samples, settings, models, metadata.generator.clone())?;
        let loss_log = LossLog::create(&folder.join(LOSS_FILE), losses)?;
        Ok(Self { models, settings, batches, held_out, optimizer, average, metadata, requirements, loss_log, path })
    }

    fn step(&mut self) -> Result<LossEntry> {
        let (losses, mut gradients) = self.accumulate()?;
        let step = self.metadata.step + 1;
        let norm = clip_gradients(&mut gradients, self.settings.clip)?;
        for (what, value) in [("loss", losses.total), ("gradient", norm)] {
            if !value.is_finite() {
                return Err(DistillError::NotFinite { step, what });
            }
        }
        let rate = self.settings.learning_rate.at(self.metadata.step, self.decay());
        self.optimizer.step(self.settings.optimizer, rate, self.models.masters(), &gradients)?;
        self.metadata.step = step;
        self.update_average()?;
        // The caller measures the time, since it knows when the run began.
        Ok(LossEntry { step, losses, norm, rate, seconds: 0.0, held_out: None })
    }

    /// Losses and gradients, averaged over the batches that make one step.
    fn accumulate(&mut self) -> Result<(Losses, Gradients)> {
        let share = 1.0 / self.settings.accumulation as f64;
        let mut losses = Losses::default();
        let mut sum = Gradients::new();
        for _ in 0..self.settings.accumulation {
            let (found, gradients) =
                backward(self.models, &self.batches.draw()?, &self.settings.loss, self.settings.activations)?;
            losses.add(found, share);
            add_gradients(&mut sum, gradients, share)?;
        }
        Ok((losses, sum))
    }

    /// Moves the average towards the masters. In the first steps the decay is smaller, as in diffusers' `EMAModel`, so that
    /// the initial weights do not dominate the average of a short training.
    fn update_average(&mut self) -> Result<()> {
        let Some(decay) = self.settings.ema else { return Ok(()) };
        let step = self.metadata.step as f64;
        let decay = decay.min((1.0 + step) / (10.0 + step));
        for (name, average) in &mut self.average {
            if let Some(master) = self.models.masters().get(name) {
                *average = ((&*average * decay)? + (master.as_tensor() * (1.0 - decay))?)?.detach();
            }
        }
        Ok(())
    }

    /// The steps over which the rate decays, as far as that is known.
    fn decay(&self) -> DecaySteps {
        let DistillSettings { steps, until_flat, .. } = *self.settings;
        if until_flat { DecaySteps::final_of(self.metadata.flat_at, steps) } else { DecaySteps::whole(steps) }
    }

    /// Begins the decay of a training that ends when its held-out error is flat.
    fn notice_flat(&mut self) {
        let entries = self.loss_log.entries();
        let is_measured = entries.last().is_some_and(|entry| entry.held_out.is_some());
        let is_open = self.settings.until_flat && self.metadata.step < self.decay().from;
        if is_open && is_measured && is_flat(entries) {
            self.metadata.flat_at = Some(self.metadata.step);
        }
    }

    /// What is left of the held-out error, at the steps at which it is measured.
    fn held_out_share(&self) -> Result<Option<f64>> {
        let evaluations = if self.settings.until_flat { OPEN_EVALUATIONS } else { EVALUATIONS };
        let every = self.settings.steps.div_ceil(evaluations);
        let is_due = self.metadata.step.is_multiple_of(every) || self.metadata.step == self.decay().end;
        let Some(held_out) = self.held_out.filter(|_| is_due) else { return Ok(None) };
        self.with_result(|models| held_out.quick_share(models)).map(Some)
    }

    /// Calls `f` while the student has the weights that would be the result of the training now.
    fn with_result<T>(&self, f: impl FnOnce(&TeacherStudent) -> Result<T>) -> Result<T> {
        if self.average.is_empty() {
            return f(self.models);
        }
        let masters = self.models.snapshot()?;
        self.models.restore(&self.average)?;
        let result = f(self.models);
        self.models.restore(&masters)?;
        result
    }

    fn save(&mut self) -> Result<()> {
        self.metadata.generator = self.batches.generator().clone();
        let masters = self.models.masters().iter();
        let state = TrainingState {
            metadata: self.metadata.clone(),
            requirements: self.requirements.clone(),
            // Not copied: no step changes them while they are written.
            masters: masters.map(|(name, master)| (name.clone(), master.as_detached_tensor())).collect(),
            average: self.average.clone(),
            optimizer: self.optimizer.clone(),
            losses: self.loss_log.entries().to_vec(),
        };
        state.save(&self.path)
    }

    fn finish(self) -> Result<Distilled> {
        if !self.average.is_empty() {
            self.models.restore(&self.average)?;
        }
        let tensors = self.models.snapshot()?;
        let seconds = self.metadata.seconds;
        Ok(Distilled {
            tensors: tensors.into_iter().collect(),
            steps: self.metadata.step,
            entries: self.loss_log.into_entries(),
            seconds,
        })
    }
}

/// The state in the file at `path`, with the masters of `models` set to it.
fn resumed_state(path: &Path, models: &TeacherStudent, requirements: ResumeRequirements) -> Result<TrainingState> {
    let state = TrainingState::load(path, requirements, &models.device())?;
    models.restore(&state.masters)?;
    Ok(state)
}

/// The state before the first step. It has no masters, since those of `models` are the initial ones.
fn first_state(models: &TeacherStudent, requirements: ResumeRequirements) -> Result<TrainingState> {
    let settings = &requirements.settings;
    let average = if settings.ema.is_some() { models.snapshot()? } else { BTreeMap::new() };
    Ok(TrainingState {
        metadata: StateMetadata::new(settings.seed),
        masters: BTreeMap::new(),
        average,
        optimizer: OptimizerState::default(),
        losses: Vec::new(),
        requirements,
    })
}
