//! [`Observer`]: watches a long call.

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
}

impl Progress {
    pub(crate) fn new(stage: Stage, done: usize, total: usize) -> Self {
        Self { done, total, fraction: done as f64 / total.max(1) as f64, ..Self::of_stage(stage) }
    }

    /// The beginning of `stage`.
    pub fn of_stage(stage: Stage) -> Self {
        Self { stage, done: 0, total: 0, fraction: 0.0, loss: None, held_out: None }
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

/// Passes notes on.
pub(crate) fn note(observer: &mut dyn Observer, message: impl Display) {
    observer.note(&message.to_string());
}
