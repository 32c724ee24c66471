//! Distillation of a student with linear attention from its teacher (CLEAR, arXiv 2412.16112, section 3.3).
//!
//! For a reader who knows diffusers: this is the training script. Teacher and student are the same transformer; the
//! teacher runs full attention, the student the attention of a plan. Only the student's attention projections (`to_q`,
//! `to_k`, `to_v`, `to_out`) are trained. No data set is needed: the teacher generates the training samples.
//!
//! 1. [`SampleSet`] is a folder of encoded prompts and of the latents that the teacher generated for them.
//! 2. [`TeacherStudent`] holds both models over one copy of the frozen weights.
//! 3. [`distill`] trains the student as [`DistillSettings`] say and keeps a checkpoint in a [`CheckpointDir`], from which
//!    it can resume bit for bit.
//!
//! candle has no activation checkpointing, so [`backward()`] does it here: it runs block by block, and memory holds the
//! activations of one block whatever the depth. This crate works through the traits of `clearform_models`; it knows no
//! architecture and reads no model files.

mod backward;
mod batches;
mod differences;
mod error;
mod fingerprint;
mod held_out;
mod learning_rate;
mod loss_log;
mod optimizer;
mod parallel;
mod sample_files;
mod sample_reader;
mod sample_set;
mod sample_settings;
mod settings;
mod teacher_student;
mod train;
mod training_state;

pub use backward::{Gradients, Losses, backward, prediction_error};
pub use batches::{Batch, Batches};
pub use error::{DistillError, Result};
pub use fingerprint::weights_fingerprint;
pub use held_out::{HELD_OUT_LEVELS, HeldOut, PredictionErrors};
pub use loss_log::LossEntry;
pub use optimizer::{OptimizerState, clip_gradients};
pub use sample_reader::Samples;
pub use sample_set::{SampleSet, SampleTeacher, SamplesDone, SamplingSpec};
pub use sample_settings::{ClassifierFree, SampleSettings};
pub use settings::{Activations, Decay, DistillSettings, LearningRate, LossSettings, Optimizer, Precision, Timesteps};
pub use teacher_student::{PairSpec, TeacherStudent};
pub use train::{
    CheckpointDir, Distilled, ResumeMode, TrainingData, TrainingOutcome, TrainingProgress, distill, recorded_settings,
    steps_within,
};
