//! From noise to latents: initial noise, schedules, guidance and the denoising loop.
//!
//! The main entry is [`denoise`]; [`TorchGenerator`] gives the noise, [`Scheduler`] the [`Schedule`], [`Guidance`] what
//! each step is conditioned on. This crate opens no file and knows no family: it steps a
//! [`clearform_models::Denoiser`].
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod config;
mod ddim;
mod denoise;
mod diffusion;
mod dpm;
mod error;
mod flow;
mod guidance;
mod mersenne;
mod noise;
mod schedule;
mod scheduler;

pub use ddim::Ddim;
pub use denoise::{StepProgress, denoise};
pub use dpm::DpmSolver;
pub use error::{Result, SamplingError};
pub use flow::FlowMatchEuler;
pub use guidance::Guidance;
pub use noise::TorchGenerator;
pub use schedule::{History, Schedule};
pub use scheduler::Scheduler;
