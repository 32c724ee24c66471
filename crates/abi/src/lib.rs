//! What crosses the boundary between clearform and a plugin: names, versions and tensors, all `repr(C)`.
//!
//! The main type is [`dlpack::ManagedTensor`]. There is no logic here. The tables of functions that host and plugin
//! exchange are not defined yet; what stands already keeps its meaning: interfaces have an id with a revision, tensors
//! cross as DLPack, and no Rust type, bool or enum does.

pub mod dlpack;

/// Major version of the boundary. A plugin of another major is refused, whatever else fits.
pub const ABI_MAJOR: u32 = 1;

/// Name of the one symbol that a plugin exports.
pub const ENTRY_SYMBOL: &str = "clearform_plugin_v1";

/// Interface of weight edits: LoRA and its kin.
pub const ADAPTER_INTERFACE: &str = "clearform.adapter/1";

/// Interface of branches that compute residuals for each block: ControlNet and its kin.
pub const BRANCH_INTERFACE: &str = "clearform.branch/1";
