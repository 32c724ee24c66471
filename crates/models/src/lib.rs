//! Diffusion transformers, VAEs and text encoders: `diffusers.models` and the text encoders of transformers, on candle.
//!
//! | diffusers or transformers | here |
//! |---|---|
//! | `FluxTransformer2DModel`, `SD3Transformer2DModel`, ... | a [`Denoiser`], built by an [`Architecture`] |
//! | arguments of the transformer's `forward` | [`DenoiserInput`] and its [`Conditions`] |
//! | `encode_prompt` of a pipeline | [`PipelineSpec::encode`], which asks [`text::TextEncoders`] |
//! | `AutoencoderKL` | [`vae::AutoencoderKl`], a [`vae::Autoencoder`] |
//! | `scheduler.add_noise` | [`NoiseProcess::add_noise`] |
//!
//! A [`Denoiser`] runs block by block ([`Denoiser::embed`], [`Denoiser::block`], [`Denoiser::head`]), so that callers
//! can act between blocks. A new family is a folder in [`families`] and a line in [`FAMILIES`].
//!
//! This crate opens no file: weights come from a [`clearform_weights::TensorSource`], tokenizers from bytes. Schedulers
//! and the denoising loop are in `clearform-sampling`.

mod architecture;
mod batch_spec;
mod config_keys;
mod denoiser;
mod error;
pub mod families;
mod family_registry;
mod layers;
mod noise_process;
mod pipeline_spec;
mod prompt;
mod random_input;
mod separate_samples;
mod shared_passes;
pub mod text;
pub mod vae;
mod weight_builder;

pub use architecture::{Architecture, DistilledLayer, InputChannels, ModelFamily};
pub use batch_spec::{BatchSpec, ImageSize};
pub use clearform_ops::MAX_GPU_ELEMENTS;
pub use denoiser::{BlockContext, Conditions, CrossText, Denoiser, DenoiserInput, HiddenState, Rotary, StepIndex};
pub use error::{ModelError, Result};
pub use families::FAMILIES;
pub use family_registry::FamilyRegistry;
pub use noise_process::{NoiseProcess, Noised, alphas_cumprod, linear_betas, without_variance};
pub use pipeline_spec::{PipelineSpec, StepSpacing};
pub use prompt::{GuidanceKind, Prompt};
pub use random_input::{InputSizes, random_input};
pub use separate_samples::SeparateSamples;
pub use shared_passes::SharedPasses;
