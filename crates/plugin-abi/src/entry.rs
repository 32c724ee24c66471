//! [`PluginEntry`]: a plugin as a Rust value, for programs that it is linked into.

use crate::host::{ClearformHost, ClearformPlugin};

/// Type of the function that a library exports as [`ENTRY_SYMBOL`](crate::ENTRY_SYMBOL). It may be called several times
/// with different hosts, each valid until the last instance that it opens is closed. It returns null if the plugin does
/// not support the host, and otherwise a struct that is valid as long as the process.
pub type EntryFunction = unsafe extern "C" fn(host: *const ClearformHost) -> *const ClearformPlugin;

/// What a plugin's library exports, as a Rust value: the same description and the same function. A program that
/// contains it needs no library.
#[derive(Debug, Clone, Copy)]
pub struct PluginEntry {
    /// Name of the package, for messages.
    pub package: &'static str,
    /// The description (TOML), without markers.
    pub description: &'static str,
    /// The entry function.
    pub function: EntryFunction,
}
