//! From noise to latents: initial noise, schedules, guidance and the denoising loop.
//!
//! The main entry is [`denoise`]; [`TorchGenerator`] gives the noise, [`FlowMatchEuler`] the [`Schedule`], [`Guidance`]
//! what each step is conditioned on. This crate opens no file and knows no family: it steps a
//! [`clearform_models::Denoiser`].
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod denoise;
mod error;
mod guidance;
mod mersenne;
mod noise;
mod schedule;

pub use denoise::{Progress, denoise};
pub use error::{Result, SamplingError};
pub use guidance::Guidance;
pub use noise::TorchGenerator;
pub use schedule::{FlowMatchEuler, Schedule};
