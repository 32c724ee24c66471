//! The host of plugins: finds them, loads the one that opens an adapter, and applies the adapter to a model.
//!
//! The path of an adapter through this crate:
//!
//! 1. [`PluginRegistry`] lists the plugins in some folders and those that are linked into the program. It reads the
//!    descriptions of libraries from their files and loads nothing. [`PluginRegistry::choose`] picks the plugin whose
//!    claims match the adapter's file.
//! 2. [`Adapter`] (LoRA and other weight edits) or [`ControlNet`] loads that plugin and lets it open the file.
//! 3. [`WeightEdits`] maps the edits of all adapters to the parameters of a model and reports what became of every
//!    tensor. [`PatchedSource`] is a tensor source with these edits applied. [`ControlledDenoiser`] runs a transformer
//!    with ControlNets and adds their residuals between its blocks.
//!
//! The C structs and function tables come from [`clearform_plugin_abi`]; every call into a plugin is in this crate, and
//! everything that a plugin returns is checked here. File formats of adapters are the plugins' business.

mod adapter;
mod adapter_config;
mod adapter_report;
mod check;
mod controlled_denoiser;
mod controlnet;
mod description;
mod edit;
mod error;
mod file;
mod library;
mod loaded_plugin;
mod origin;
mod patched_source;
mod registry;
mod strength;
mod tensors;
mod weight_edits;

pub use clearform_plugin_abi::{ADAPTER_INTERFACE, CONTROLNET_INTERFACE, PluginEntry};

pub use adapter::Adapter;
pub use adapter_config::{adapter_files, adapter_parts};
pub use adapter_report::AdapterReport;
pub use check::{ExampleResults, check_plugin};
pub use controlled_denoiser::{ControlNetInput, ControlledDenoiser, ResidualReuse, is_within};
pub use controlnet::{BaseModel, ControlInput, ControlKind, ControlNet, Controls, Residual};
pub use description::{Description, Example, ExampleBase, ExampleStep, FileClaim, RefusedFile};
pub use edit::{Edit, EditKind};
pub use error::{PluginError, Result};
pub use origin::PluginOrigin;
pub use patched_source::{LowRankMode, PatchedSource};
pub use registry::{Plugin, PluginChoice, PluginRegistry, plugin_at};
pub use strength::Strength;
pub use weight_edits::{ComponentParameters, ScaledAdapter, WeightEdits};
