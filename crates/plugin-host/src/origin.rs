//! [`PluginOrigin`]: where a plugin comes from.

use clearform_plugin_abi::PluginEntry;
use std::fmt;
use std::path::PathBuf;

/// Where a plugin comes from. Messages name it as it is displayed.
#[derive(Debug, Clone)]
pub enum PluginOrigin {
    /// The shared library at this path.
    Library(PathBuf),
    /// The program itself, which the plugin is linked into.
    Linked(PluginEntry),
}

impl fmt::Display for PluginOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library(path) => write!(f, "{}", path.display()),
            Self::Linked(entry) => write!(f, "{} (linked into the program)", entry.package),
        }
    }
}
