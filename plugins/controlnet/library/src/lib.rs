//! The plugin `controlnet` as a shared library: exports the crate `clearform-controlnet` as C symbols.

clearform_plugin_abi::export_entry!(clearform_controlnet::PLUGIN);
