//! The host side of plugins. It does not load any yet: [`available`] says so to those who ask.
//!
//! It will find libraries, read their descriptions without loading them, and wrap what they offer; all `unsafe` of
//! that boundary will lie here. It knows no kind of adapter.

/// A plugin, as its embedded description tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    /// Name that `--adapter FILE,plugin=ID` takes.
    pub id: String,
    /// Interface with its revision ([`clearform_abi::ADAPTER_INTERFACE`], [`clearform_abi::BRANCH_INTERFACE`]).
    pub interface: String,
}

/// The plugins that can be used, sorted by id. There are none, as this version of clearform loads none.
pub fn available() -> Vec<Plugin> {
    Vec::new()
}
