//! The host side of plugins: find, choose, load and wrap them, and do to a model what they say.
//!
//! The main types are [`Shelf`], the plugins at hand, [`Adapter`] with [`Adapted`], the edits of an adapter file and a
//! source of tensors with them, and [`Branch`] with [`Controlled`], a network beside a transformer and the two together.
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

pub use adapted::{Adapted, LowRankMode};
pub use adapter::{Adapter, Edit, EditKind};
pub use branch::{BaseModel, Branch, ControlInput, ControlKind, Controls, Residual};
pub use changes::{AdapterReport, Applied, Changes, Parts};
pub use check::{Checked, check};
pub use controlled::{Control, Controlled};
pub use description::{Claim, Description, Example, ExampleBase, ExampleStep};
pub use error::{PluginError, Result};
pub use shelf::{Choice, Plugin, Shelf, plugin_at};
pub use strength::Strength;
