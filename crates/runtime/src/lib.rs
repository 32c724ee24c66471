//! From a model folder to pictures: components, the stages of a pipeline, PNG files and their comparison.
//!
//! The main type is [`Pipeline`], which loads text encoders, transformer and VAE one after another and releases each
//! before the next. This crate knows where files lie; what they compute is in `clearform_models`, how a picture is
//! stepped in `clearform_sampling`.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapters;
pub mod compare;
mod components;
mod control;
mod control_concat;
mod error;
mod images;
mod latent_spec;
mod pipeline;
pub mod png;
mod text;
mod transformer;

pub use adapters::{ActiveControlNet, AdapterRequest, Adapters, ControlNetSchedule, EDITED_PARTS, EditedTransformer};
pub use components::Components;
pub use error::{Result, RuntimeError};
pub use image::RgbImage;
pub use images::{check_images, to_images};
pub use pipeline::{GenerateRequest, InitialLatents, Pipeline, PipelineOptions, PipelineStage};
pub use transformer::{ReadOptions, Transformer};
