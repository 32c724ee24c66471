//! Distillation of a linear student against its teacher (CLEAR, section 3.3).
//!
//! The main entry is [`distill`]. A [`TeacherStudent`] is teacher and student over shared frozen weights; a [`SampleSet`] is what
//! the teacher drew for itself, on disk; [`DistillSettings`] say how it is trained. Backward goes block by block, so that
//! memory does not grow with depth times activations. This crate knows no family and reads no checkpoint.

mod backward;
mod batches;
mod checkpoint;
mod error;
mod loss_log;
mod optimizer;
mod samples;
mod schedule;
mod settings;
mod teacher_student;
mod train;

pub use backward::{Gradients, Losses, backward, prediction_error};
pub use batches::{Batch, Batches};
pub use error::{DistillError, Result};
pub use loss_log::LossEntry;
pub use optimizer::{OptimizerState, clip};
pub use samples::{ClassifierFree, SampleSet, SampleSettings, Samples, SamplingSpec};
pub use settings::{Activations, Decay, DistillSettings, LearningRate, LossSettings, Optimizer, Precision, Timesteps};
pub use teacher_student::{PairSpec, TeacherStudent};
pub use train::{CheckpointDir, Distilled, ResumeMode, TrainingOutcome, TrainingProgress, distill};
