//! Schedulers, initial noise, guidance and the denoising loop: `diffusers.schedulers` and a pipeline's `__call__`.
//!
//! | diffusers or PyTorch | here |
//! |---|---|
//! | `torch.Generator("cpu").manual_seed(seed)`, `torch.randn` | [`TorchGenerator`] |
//! | a scheduler's class and config | [`Scheduler`]: [`FlowMatchEuler`], [`Ddim`] or [`DpmSolver`] |
//! | `set_timesteps` | [`Scheduler::schedule`], which returns a [`Schedule`] |
//! | `scheduler.step` | [`Schedule::step`], with a [`SolverState`] for multistep solvers |
//! | `prompt_embeds`, `negative_prompt_embeds` and `guidance_scale` | [`Guidance`] |
//! | the loop over timesteps | [`denoise()`] |
//!
//! Results are compared with diffusers in this crate's tests. This crate opens no file: schedulers are read from JSON
//! values, and any [`clearform_models::Denoiser`] can be sampled.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod config;
mod ddim;
mod denoise;
mod diffusion;
mod dpm;
mod error;
mod flow;
mod guidance;
mod schedule;
mod scheduler;

pub use clearform_ops::TorchGenerator;
pub use ddim::Ddim;
pub use denoise::{Start, StepAction, StepProgress, denoise};
pub use dpm::DpmSolver;
pub use error::{Result, SamplingError};
pub use flow::FlowMatchEuler;
pub use guidance::Guidance;
pub use schedule::{Schedule, SolverState};
pub use scheduler::Scheduler;
