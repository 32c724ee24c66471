//! The host side of plugins: find, choose, load and wrap them, and do to a model what they say.
//!
//! The main types are [`PluginRegistry`], the plugins at hand, [`AdapterPlugin`] with [`PatchedSource`], the edits of an adapter file and a
//! source of tensors with them, and [`ControlNet`] with [`ControlledDenoiser`], a network beside a transformer and the two together.
//! All `unsafe` of the boundary lies here. It knows no format of adapters: plugins do.

mod adapted;
mod adapter;
mod branch;
mod changes;
mod check;
mod controlled;
mod description;
mod error;
mod file;
mod library;
mod shelf;
mod strength;
mod tensors;

pub use clearform_plugin_abi::{ADAPTER_INTERFACE, BRANCH_INTERFACE};

pub use adapted::{LowRankMode, PatchedSource};
pub use adapter::{Adapter, Edit, EditKind};
pub use branch::{BaseModel, ControlInput, ControlKind, ControlNet, Controls, Residual};
pub use changes::{AdapterReport, ComponentParameters, ScaledAdapter, WeightEdits};
pub use check::{ExampleResult, check};
pub use controlled::{ControlNetInput, ControlledDenoiser};
pub use description::{Description, Example, ExampleBase, ExampleStep, FileClaim};
pub use error::{PluginError, Result};
pub use shelf::{Plugin, PluginChoice, PluginRegistry, plugin_at};
pub use strength::Strength;
