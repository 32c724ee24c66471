//! Diffusion transformers, VAEs and text encoders, as computations alone.
//!
//! The main types are [`Denoiser`], a transformer that is stepped block by block, and [`Family`], which builds one.
//! This crate opens no file: weights come from a [`clearform_weights::TensorSource`], tokenizers from bytes.

mod batch_spec;
mod config_keys;
mod denoiser;
mod error;
pub mod families;
mod family;
mod layers;
mod noise_process;
mod prompt;
mod random;
pub mod text;
pub mod vae;
mod weight_builder;

pub use batch_spec::{BatchSpec, ImageSize};
pub use denoiser::{BlockContext, Conditions, CrossText, Denoiser, DenoiserInput, HiddenState, Rotary, StepIndex};
pub use error::{ModelError, Result};
pub use family::{DistilledLayer, FAMILIES, Family, StepSpacing};
pub use noise_process::{NoiseProcess, Noised, alphas_cumprod, linear_betas, without_variance};
pub use prompt::{GuidanceKind, Prompt};
pub use random::{InputChannels, InputSizes, random_input};
