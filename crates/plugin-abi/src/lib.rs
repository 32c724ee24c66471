//! What crosses the boundary between clearform and a plugin, all `repr(C)`, and the author's side of it in Rust.
//!
//! The main types are [`ClearformPlugin`], what a plugin exports, [`ClearformHost`], what it is lent, and the tables of the two interfaces,
//! [`ClearformAdapterTable`] and [`ClearformBranchTable`]. `include/clearform_plugin.h` says the same in C, and a test holds the two
//! together. [`sdk`] turns a Rust type into such tables.
//!
//! Four rules hold everywhere. A table or struct begins with its size, grows only at its end, and is read and written
//! only as far as that size says. No Rust type, bool or enum crosses. A tensor is owned by whoever received it, who calls
//! its deleter once; where one is only lent, the comment says so. A function that can fail returns 0 or else has told
//! [`ClearformHost::fail`] why.

#[cfg(feature = "candle")]
mod candle;
mod controlnet;
pub mod dlpack;
mod edits;
mod host;
pub mod sdk;
pub mod tensor;

pub use controlnet::{
    CONTROL_LATENTS, CONTROL_PIXELS, ClearformBase, ClearformBranchInfo, ClearformBranchTable, ClearformGiveResidual,
    ClearformStep,
};
pub use edits::{
    ClearformAdapterTable, ClearformEdit, ClearformEditTensors, EDIT_DECOMPOSED, EDIT_DELTA, EDIT_LOW_RANK,
    EDIT_REPLACE, EDIT_SCALE, WHOLE_PARAMETER,
};
pub use host::{
    ClearformFile, ClearformHost, ClearformPair, ClearformPlugin, ClearformTensorInfo, ClearformText, LOG_ERROR,
    LOG_INFO, LOG_WARNING,
};

/// Major version of the boundary. A plugin of another major is refused, whatever else fits.
pub const ABI_MAJOR: u32 = 1;

/// Name of the one function that a plugin exports: `const ClearformPlugin *(const ClearformHost *)`. It may be
/// called more than once, each time with a host of its own; what it returns lives as long as the process.
pub const ENTRY_SYMBOL: &str = "clearform_plugin_v1";

/// Interface of weight edits: LoRA and its kin. Its table is an [`ClearformAdapterTable`].
pub const ADAPTER_INTERFACE: &str = "clearform.adapter/1";

/// Interface of branches that compute residuals for each block: ControlNet and its kin. Its table is a [`ClearformBranchTable`].
pub const CONTROLNET_INTERFACE: &str = "clearform.branch/1";

/// What stands in the file of a library before its description, which is TOML. The host finds it by this mark, without
/// loading the library.
pub const DESCRIPTION_BEGIN: &str = "<<clearform-plugin-description/1>>";

/// What stands after the description.
pub const DESCRIPTION_END: &str = "<<end-of-clearform-plugin-description>>";

/// Status: done.
pub const OK: i32 = 0;

/// Status: not done; [`ClearformHost::fail`] was told why.
pub const FAILED: i32 = 1;
