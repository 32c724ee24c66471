//! The C interface between clearform and its plugins, as Rust types, and an SDK for writing plugins in Rust.
//!
//! A plugin teaches clearform a kind of adapter: LoRA files, ControlNets, or a format of your own. It is usually a
//! shared library, which exports one function, [`ENTRY_SYMBOL`], that returns a [`ClearformPlugin`]. That struct names
//! an interface and points to its function table:
//!
//! - [`ClearformAdapterTable`] (`clearform.adapter/1`): the plugin turns a file into edits of weights;
//! - [`ClearformBranchTable`] (`clearform.branch/1`): the plugin runs a ControlNet, or a similar network beside the
//!   model, and returns residuals for the model's blocks. "Branch" is the interface's stable word for such a network;
//!   elsewhere it is called a ControlNet.
//!
//! To write a plugin in Rust, start at [`sdk`]: implement [`sdk::AdapterPlugin`] or [`sdk::ControlNetPlugin`] and
//! export it with one macro. A plugin in Rust can also be linked into a program, as a [`PluginEntry`]; it is then
//! called through the same function and tables. For other languages there is `include/clearform_plugin.h`; the Rust
//! types here bear the names of its structs, and `tests/abi.rs` compares sizes, offsets and constants of the two.
//!
//! Four rules apply everywhere:
//!
//! 1. A table or struct with a size field grows only at its end. It is read and written only up to that size.
//! 2. Only C types cross the interface: no Rust enum, `bool` or panic does.
//! 3. The receiver of a tensor owns it and calls its deleter exactly once. Where a tensor or text is only borrowed,
//!    the comment says so and for how long.
//! 4. A function that can fail returns [`OK`]. Otherwise it first passes the reason to [`ClearformHost::fail`], and
//!    returns [`FAILED`].

#[cfg(feature = "candle")]
mod candle;
mod controlnet;
pub mod dlpack;
mod edits;
mod entry;
mod host;
pub mod sdk;
pub mod tensor;

pub use controlnet::{
    CONTROL_LATENTS, CONTROL_PIXELS, ClearformBase, ClearformBranchInfo, ClearformBranchTable, ClearformGiveResidual,
    ClearformStep, EMBEDDED_LATENTS, UNSHIFTED_CONTROL, ZERO_POOLED,
};
pub use edits::{
    ClearformAdapterTable, ClearformEdit, ClearformEditTensors, EDIT_DECOMPOSED, EDIT_DELTA, EDIT_LOW_RANK,
    EDIT_REPLACE, EDIT_SCALE, WHOLE_PARAMETER,
};
pub use entry::{EntryFunction, PluginEntry};
pub use host::{
    ClearformFile, ClearformHost, ClearformPair, ClearformPlugin, ClearformTensorInfo, ClearformText, LOG_ERROR,
    LOG_INFO, LOG_WARNING,
};

/// Major version of the C interface. The host rejects plugins built for another one.
pub const ABI_MAJOR: u32 = 1;

/// Name of the function that every plugin's library exports: `const ClearformPlugin *(const ClearformHost *)`, an
/// [`EntryFunction`].
pub const ENTRY_SYMBOL: &str = "clearform_plugin_v1";

/// Interface of adapters that edit weights, such as LoRA. Its table is a [`ClearformAdapterTable`].
pub const ADAPTER_INTERFACE: &str = "clearform.adapter/1";

/// Interface of ControlNets and similar networks, which compute residuals for the model's blocks. Its table is a
/// [`ClearformBranchTable`].
pub const CONTROLNET_INTERFACE: &str = "clearform.branch/1";

/// Marker before the description (TOML) in a library's file. The host searches the file for it, and so reads the
/// description without loading the library.
pub const DESCRIPTION_BEGIN: &str = "<<clearform-plugin-description/1>>";

/// Marker after the description.
pub const DESCRIPTION_END: &str = "<<end-of-clearform-plugin-description>>";

/// Status: success.
pub const OK: i32 = 0;

/// Status: failure; the reason was passed to [`ClearformHost::fail`].
pub const FAILED: i32 = 1;
