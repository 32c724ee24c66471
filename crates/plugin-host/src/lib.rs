//! The host side of plugins: find, choose, load and wrap them, and do to a model what they say.
//!
//! The main types are [`PluginRegistry`], the plugins at hand, [`AdapterPlugin`] with [`PatchedSource`], the edits of an adapter file and a
//! source of tensors with them, and [`ControlNet`] with [`ControlledDenoiser`], a network beside a transformer and the two together.
//! All `unsafe` of the boundary lies here. It knows no format of adapters: plugins do.

mod adapter;
mod check;
mod controlled_denoiser;
mod controlnet;
mod description;
mod error;
mod file;
mod library;
mod patched_source;
mod registry;
mod strength;
mod tensors;
mod weight_edits;

pub use clearform_plugin_abi::{ADAPTER_INTERFACE, CONTROLNET_INTERFACE};

pub use adapter::{Adapter, Edit, EditKind};
pub use check::{ExampleResult, check};
pub use controlled_denoiser::{ControlNetInput, ControlledDenoiser};
pub use controlnet::{BaseModel, ControlInput, ControlKind, ControlNet, Controls, Residual};
pub use description::{Description, Example, ExampleBase, ExampleStep, FileClaim};
pub use error::{PluginError, Result};
pub use patched_source::{LowRankMode, PatchedSource};
pub use registry::{Plugin, PluginChoice, PluginRegistry, plugin_at};
pub use strength::Strength;
pub use weight_edits::{AdapterReport, ComponentParameters, ScaledAdapter, WeightEdits};
