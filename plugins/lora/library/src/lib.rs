//! The plugin `lora` as a shared library: exports the crate `clearform-lora` as C symbols.

clearform_plugin_abi::export_entry!(clearform_lora::PLUGIN);
