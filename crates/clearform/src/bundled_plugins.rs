//! The plugins that are linked into the program, and so always there.

use clearform_plugin_host::PluginEntry;

/// A library with the same id takes precedence.
pub const BUNDLED_PLUGINS: [PluginEntry; 2] = [clearform_controlnet::PLUGIN, clearform_lora::PLUGIN];
