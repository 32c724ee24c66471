//! [`distill`]: the training loop. What it needs to go on after a kill lies in one file, written at intervals.

use crate::checkpoint::{ResumeRequirements, StateMetadata, TrainingState};
use crate::loss_log::LossLog;
use crate::{
    Batches, DistillError, DistillSettings, Gradients, LossEntry, Losses, OptimizerState, Result, SampleSet,
    TeacherStudent, backward, clip,
};
use candle_core::Tensor;
use clearform_weights::InMemoryTensors;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where training keeps its files: `training.safetensors` and `losses.jsonl`.
#[derive(Debug, Clone)]
pub struct CheckpointDir {
    /// The folder; it is made if it is not there.
    pub folder: PathBuf,
    /// Steps between checkpoints; one is written at the end in any case.
    pub checkpoint_every: usize,
    /// What to do with what is there.
    pub start: ResumeMode,
}

/// What to do with an earlier checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeMode {
    /// There must be none.
    Fresh,
    /// Continue from it bit for bit; where there is none, begin.
    Resume,
}

/// A step that is done.
#[derive(Debug, Clone, Copy)]
pub struct TrainingProgress {
    /// The step, as the journal has it.
    pub entry: LossEntry,
    /// Steps in all.
    pub steps: usize,
    /// Time left, from the mean of this sitting's steps.
    pub left: Duration,
}

/// What came of it.
#[derive(Debug)]
pub enum TrainingOutcome {
    /// All steps are done.
    Finished(Distilled),
    /// The observer stopped it; the checkpoint holds this many steps.
    Stopped {
        /// Steps done.
        step: usize,
    },
}

/// A trained student.
#[derive(Debug)]
pub struct Distilled {
    /// Trained parameters by canonical name, f32: the moving average if there is one, else the masters.
    pub tensors: InMemoryTensors,
    /// Every step.
    pub entries: Vec<LossEntry>,
    /// Seconds of training, all sittings together.
    pub seconds: f64,
}

/// Trains the student of `pair` on `samples`. After each step `observe` is told, and may stop it.
///
/// # Errors
/// A setting that nothing can be trained with, work begun with other settings, a loss that is not finite.
pub fn distill(
    models: &TeacherStudent,
    samples: &SampleSet,
    settings: &DistillSettings,
    checkpoint_dir: &CheckpointDir,
    observe: &mut dyn FnMut(&TrainingProgress) -> ControlFlow<()>,
) -> Result<TrainingOutcome> {
    settings.check()?;
    let mut training = TrainingRun::begin(models, samples, settings, checkpoint_dir)?;
    let (begun, from) = (Instant::now(), training.record.step);
    let earlier = training.record.seconds;
    while training.record.step < settings.steps {
        let mut entry = training.step()?;
        entry.seconds = earlier + begun.elapsed().as_secs_f64();
        training.record.seconds = entry.seconds;
        training.journal.add(entry)?;
        let left = begun.elapsed() * (settings.steps - entry.step) as u32 / (entry.step - from) as u32;
        let flow = observe(&TrainingProgress { entry, steps: settings.steps, left });
        if flow.is_break()
            || entry.step.is_multiple_of(checkpoint_dir.checkpoint_every.max(1))
            || entry.step == settings.steps
        {
            training.save()?;
        }
        if flow.is_break() && entry.step < settings.steps {
            return Ok(TrainingOutcome::Stopped { step: entry.step });
        }
    }
    training.finish().map(TrainingOutcome::Finished)
}

struct TrainingRun<'a> {
    models: &'a TeacherStudent,
    settings: &'a DistillSettings,
    batches: Batches<'a>,
    optimizer: OptimizerState,
    average: BTreeMap<String, Tensor>,
    record: StateMetadata,
    begun: ResumeRequirements,
    journal: LossLog,
    path: PathBuf,
}

impl<'a> TrainingRun<'a> {
    fn begin(
        models: &'a TeacherStudent,
        samples: &'a SampleSet,
        settings: &'a DistillSettings,
        checkpoint_dir: &CheckpointDir,
    ) -> Result<Self> {
        let folder = &checkpoint_dir.folder;
        std::fs::create_dir_all(folder).map_err(|source| DistillError::Io { path: folder.clone(), source })?;
        let path = folder.join("training.safetensors");
        let begun = ResumeRequirements { settings: settings.clone(), samples: samples.settings().clone() };
        let device = models.device();
        let state = match (path.exists(), checkpoint_dir.start) {
            (true, ResumeMode::Resume) => Some(TrainingState::load(&path, begun.clone(), &device)?),
            (true, ResumeMode::Fresh) => {
                let reason = "an earlier training stands here; give --resume to go on with it, or delete it".to_owned();
                return Err(DistillError::BadFile { path, reason });
            }
            (false, _) => None,
        };
        let (record, optimizer, average) = match state {
            Some(state) => {
                models.restore(&state.masters)?;
                (state.record, state.optimizer, state.average)
            }
            None => {
                let average = if settings.ema.is_some() { models.snapshot()? } else { BTreeMap::new() };
                (StateMetadata::new(settings.seed), OptimizerState::default(), average)
            }
        };
        let batches = Batches::new(samples, settings, models, record.generator.clone());
        let journal = LossLog::open(&folder.join("losses.jsonl"), record.step)?;
        Ok(Self { models, settings, batches, optimizer, average, record, begun, journal, path })
    }

    fn step(&mut self) -> Result<LossEntry> {
        let (losses, mut gradients) = self.accumulate()?;
        let step = self.record.step + 1;
        let norm = clip(&mut gradients, self.settings.clip)?;
        for (what, value) in [("loss", losses.total), ("gradient", norm)] {
            if !value.is_finite() {
                return Err(DistillError::NotFinite { step, what });
            }
        }
        let rate = self.settings.learning_rate.at(self.record.step, self.settings.steps);
        self.optimizer.step(self.settings.optimizer, rate, self.models.masters(), &gradients)?;
        self.record.step = step;
        self.update_student()?;
        Ok(LossEntry { step, losses, norm, rate, seconds: 0.0 })
    }

    /// Mean losses and gradients of the batches that make one step.
    fn accumulate(&mut self) -> Result<(Losses, Gradients)> {
        let share = 1.0 / self.settings.accumulation as f64;
        let (mut losses, mut sum) = (Losses::default(), Gradients::new());
        for _ in 0..self.settings.accumulation {
            let (found, gradients) =
                backward(self.models, &self.batches.draw()?, &self.settings.loss, self.settings.activations)?;
            losses.denoising += found.denoising * share;
            losses.prediction += found.prediction * share;
            losses.attention += found.attention * share;
            losses.total += found.total * share;
            for (name, gradient) in gradients {
                let gradient = (gradient * share)?;
                let added = match sum.get(&name) {
                    Some(before) => (before + gradient)?,
                    None => gradient,
                };
                sum.insert(name, added);
            }
        }
        Ok((losses, sum))
    }

    /// Moves the average towards the masters, faster in the first steps.
    fn update_student(&mut self) -> Result<()> {
        let Some(decay) = self.settings.ema else { return Ok(()) };
        let step = self.record.step as f64;
        let decay = decay.min((1.0 + step) / (10.0 + step));
        for (name, average) in &mut self.average {
            if let Some(master) = self.models.masters().get(name) {
                *average = ((&*average * decay)? + (master.as_tensor() * (1.0 - decay))?)?.detach();
            }
        }
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.record.generator = self.batches.generator().clone();
        let masters = self.models.masters().iter();
        let state = TrainingState {
            record: self.record.clone(),
            begun: self.begun.clone(),
            // Not copies: nothing steps while they are written.
            masters: masters.map(|(name, master)| (name.clone(), master.as_detached_tensor())).collect(),
            average: self.average.clone(),
            optimizer: self.optimizer.clone(),
        };
        state.save(&self.path)
    }

    fn finish(self) -> Result<Distilled> {
        let tensors = if self.average.is_empty() { self.models.snapshot()? } else { self.average };
        let seconds = self.record.seconds;
        Ok(Distilled { tensors: tensors.into_iter().collect(), entries: self.journal.into_entries(), seconds })
    }
}
