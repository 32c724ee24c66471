//! From a model folder to pictures: components, the stages of a pipeline, PNG files and their comparison.
//!
//! The main type is [`Pipeline`], which loads text encoders, transformer and VAE one after another and releases each
//! before the next. This crate knows where files lie; what they compute is in `clearform_models`, how a picture is
//! stepped in `clearform_sampling`.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapters;
mod beside;
mod canvas;
pub mod compare;
mod components;
mod control;
mod error;
mod picture;
mod pipeline;
pub mod png;
mod text;
mod transformer;

pub use adapters::{Acting, ActingBranch, AdapterRequest, Adapters, EDITED_PARTS, Edited};
pub use components::Components;
pub use error::{Result, RuntimeError};
pub use image::RgbImage;
pub use picture::{Frame, Size, check_pictures, to_pictures};
pub use pipeline::{Latents, Options, Pipeline, Request, Stage};
pub use transformer::{Reading, Transformer};
