//! [`Observer`]: watches a long call.

use crate::TrainingOptions;
use std::fmt::Display;
use std::ops::ControlFlow;

/// Watches a long call: its progress, and messages for the user. It may cancel. `()` watches nothing.
pub trait Observer {
    /// Called as work proceeds, after every denoising or training step at the latest; `done` counts finished units
    /// only. [`ControlFlow::Break`] cancels: the call returns
    /// [`ClearformError::Cancelled`](crate::ClearformError::Cancelled) and leaves nothing half-written. Samples and
    /// training checkpoints stay, so that the same call with `resume` continues.
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        let _ = progress;
        ControlFlow::Continue(())
    }

    /// A message for the user: an assumption, something that was skipped, how much of an adapter was applied.
    fn note(&mut self, message: &str) {
        let _ = message;
    }
}

impl Observer for () {}

/// How far a stage is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Finished units: bytes written, samples, steps or images.
    pub done: usize,
    /// All units of the stage; 0 for stages that are not counted.
    pub total: usize,
    /// How much of the stage is done, from 0 to 1, with the part of the units that are under way.
    pub fraction: f64,
    /// Loss of the last training step, while distilling.
    pub loss: Option<f64>,
    /// What is left of the error before training on samples that are not trained on, a share, while distilling; `None`
    /// before it is first measured.
    pub held_out: Option<f64>,
    /// Which of the call's stages this is, in calls that have several of some length.
    pub number: Option<StageNumber>,
}

/// The place of a stage among those of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageNumber {
    /// The stage's, from 1.
    pub number: usize,
    /// How many stages there are.
    pub total: usize,
}

impl Progress {
    pub(crate) fn new(stage: Stage, done: usize, total: usize) -> Self {
        Self { done, total, fraction: done as f64 / total.max(1) as f64, ..Self::of_stage(stage) }
    }

    /// The beginning of `stage`.
    pub fn of_stage(stage: Stage) -> Self {
        Self { stage, done: 0, total: 0, fraction: 0.0, loss: None, held_out: None, number: None }
    }
}

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Writing a model, in bytes.
    Writing,
    /// Generating training samples with the teacher.
    Samples,
    /// Training the student, in optimizer steps.
    Distilling,
    /// Encoding prompts.
    Encoding,
    /// Loading the transformer.
    Loading,
    /// Denoising, in steps.
    Denoising,
    /// Decoding images.
    Decoding,
    /// Generating images to compare, in images.
    Comparing,
}

/// Numbers the stages of a call whose stages are known beforehand, and passes everything on.
pub(crate) struct NumberedStages<'a> {
    observer: &'a mut dyn Observer,
    /// In the order in which they come.
    stages: Vec<Stage>,
    /// The index of the one under way.
    current: usize,
}

impl<'a> NumberedStages<'a> {
    /// The stages of making a model: with training, samples, the student before it, the training, the student after it,
    /// and writing.
    pub fn of_conversion(observer: &'a mut dyn Observer, training: Option<&TrainingOptions>) -> Self {
        let judges = training.is_some_and(|training| training.held_out > 0);
        let samples = training.is_some_and(TrainingOptions::generates_samples) || judges;
        let stages = [
            (samples, Stage::Samples),
            (judges, Stage::Comparing),
            (training.is_some(), Stage::Distilling),
            (judges, Stage::Comparing),
            (true, Stage::Writing),
        ];
        let stages = stages.into_iter().filter(|(has_it, _)| *has_it).map(|(_, stage)| stage).collect();
        Self { observer, stages, current: 0 }
    }

    /// The number of `stage`, which is the one under way or a later one. Stages that an earlier run has done are passed
    /// over.
    fn number(&mut self, stage: Stage) -> Option<StageNumber> {
        self.current += self.stages[self.current..].iter().position(|later| *later == stage)?;
        let total = self.stages.len();
        (total > 1).then_some(StageNumber { number: self.current + 1, total })
    }
}

impl Observer for NumberedStages<'_> {
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        let number = self.number(progress.stage);
        self.observer.progress(&Progress { number, ..*progress })
    }

    fn note(&mut self, message: &str) {
        self.observer.note(message);
    }
}

/// Shows `shown` whatever is done meanwhile, and passes notes on.
pub(crate) struct StandingProgress<'a> {
    pub observer: &'a mut dyn Observer,
    pub shown: Progress,
}

impl Observer for StandingProgress<'_> {
    fn progress(&mut self, _: &Progress) -> ControlFlow<()> {
        self.observer.progress(&self.shown)
    }

    fn note(&mut self, message: &str) {
        self.observer.note(message);
    }
}

/// Passes notes on.
pub(crate) fn note(observer: &mut dyn Observer, message: impl Display) {
    observer.note(&message.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers that a call of `stages` shows.
    fn numbers(training: Option<&TrainingOptions>, stages: &[Stage]) -> Vec<Option<[usize; 2]>> {
        let mut seen = Seen(Vec::new());
        let mut numbered = NumberedStages::of_conversion(&mut seen, training);
        for stage in stages {
            let _ = numbered.progress(&Progress::of_stage(*stage));
        }
        seen.0
    }

    struct Seen(Vec<Option<[usize; 2]>>);

    impl Observer for Seen {
        fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
            self.0.push(progress.number.map(|StageNumber { number, total }| [number, total]));
            ControlFlow::Continue(())
        }
    }

    #[test]
    fn stages_are_numbered_as_they_come() {
        use Stage::{Comparing, Distilling, Samples, Writing};
        let training = TrainingOptions::default();
        let all = [Samples, Samples, Comparing, Distilling, Distilling, Comparing, Writing];
        let counted = [1, 1, 2, 3, 3, 4, 5].map(|number| Some([number, 5]));
        assert_eq!(numbers(Some(&training), &all), counted);
        let resumed = numbers(Some(&training), &[Distilling, Comparing, Writing]);
        assert_eq!(resumed, [3, 4, 5].map(|number| Some([number, 5])));
        let unjudged = TrainingOptions { held_out: 0, ..training };
        let counted = [1, 2, 3].map(|number| Some([number, 3]));
        assert_eq!(numbers(Some(&unjudged), &[Samples, Distilling, Writing]), counted);
        assert_eq!(numbers(None, &[Writing]), [None]);
    }
}
