//! From a model folder and a prompt to images: diffusers' `DiffusionPipeline` for the transformers of this workspace.
//!
//! For a reader who knows diffusers:
//!
//! - [`Pipeline`] is `DiffusionPipeline`. [`Pipeline::open`] reads configs only; [`Pipeline::generate`] loads text encoders,
//!   transformer and VAE in sequence and releases each before the next, as `enable_model_cpu_offload` would. Its
//!   stages ([`Pipeline::encode`], [`Pipeline::schedule`], [`Pipeline::decode`], ...) can also be called one by one.
//! - [`LoadedPipeline`] keeps them in memory instead, for many images.
//! - [`Components`] finds the components of a pipeline in folders, in a single-file checkpoint or in files of their
//!   own.
//! - [`TransformerCheckpoint`] is an identified checkpoint that is not loaded yet.
//! - [`Adapters`] are LoRA files and ControlNets, opened by plugins.
//! - [`image_file`] writes images with their parameters, [`image_metrics`] measures how similar images are.
//!
//! This crate knows where files are. What they compute is in `clearform_models`, the denoising loop in
//! `clearform_sampling`.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapters;
mod component_check;
mod component_files;
mod components;
mod control;
mod control_concat;
mod control_mask;
mod damage;
mod error;
mod exif;
mod files;
mod generate;
mod gpu_limits;
mod held_weights;
mod image_batch;
pub mod image_file;
pub mod image_metrics;
mod images;
mod latent_spec;
mod loaded_pipeline;
mod memory_plan;
mod parameters;
mod pipeline;
mod pipeline_memory;
pub mod png;
mod stages;
mod system_memory;
mod text;
mod transformer_checkpoint;
mod weight_bytes;
mod xmp;

pub use adapters::{
    ActiveControlNet, AdapterRequest, Adapters, ControlNetSchedule, EDITABLE_COMPONENTS, EditedTransformer,
};
pub use component_files::ComponentFiles;
pub use components::Components;
pub use control::ControlImages;
pub use control_concat::with_control;
pub use error::{Result, RuntimeError};
pub use generate::{GenerateRequest, PipelineStage};
pub use gpu_limits::{check_dtype, default_dtype};
pub use image::RgbImage;
pub use image_batch::{ImageBatch, PreparedBatch};
pub use images::{check_images, to_images};
pub use loaded_pipeline::LoadedPipeline;
pub use memory_plan::{EvaluationSize, MemoryOptions, MemoryPlan, OffloadMode, Residency, StageMemory};
pub use parameters::GenerationParameters;
pub use pipeline::{Pipeline, PipelineOptions};
pub use stages::{EncodedPrompts, GuidanceScales, InitialLatents};
pub use transformer_checkpoint::{BuildSpec, ReadOptions, TransformerCheckpoint};
