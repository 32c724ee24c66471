//! Distillation of a linear student against its teacher (CLEAR, section 3.3).
//!
//! The main entry is [`distill`]. A [`Pair`] is teacher and student over shared frozen weights; a [`SampleSet`] is what
//! the teacher drew for itself, on disk; [`Settings`] say how it is trained. Backward goes block by block, so that
//! memory does not grow with depth times activations. This crate knows no family and reads no checkpoint.

mod backward;
mod batches;
mod checkpoint;
mod error;
mod journal;
mod optimizer;
mod pair;
mod samples;
mod schedule;
mod settings;
mod train;

pub use backward::{Gradients, Losses, backward, prediction_error};
pub use batches::{Batch, Batches};
pub use error::{DistillError, Result};
pub use journal::Entry;
pub use optimizer::{OptimizerState, clip};
pub use pair::{Pair, Recipe};
pub use samples::{Canvas, ClassifierFree, SampleSet, SampleSettings, Samples};
pub use settings::{Activations, Decay, LearningRate, LossSettings, Optimizer, Precision, Settings, Timesteps};
pub use train::{Distilled, Outcome, Progress, Start, Workshop, distill};
