//! A ControlNet file through its plugin, for a tiny model: the control input it expects. Only the header of the file matters.
#![no_main]

use clearform_controlnet::ControlNetFile;
use clearform_fuzz::lend::open_adapter;
use clearform_plugin_abi::{ClearformBase, ClearformBranchInfo, ClearformBranchTable, ClearformText, OK};
use libfuzzer_sys::fuzz_target;
use std::ffi::c_void;

static TABLE: ClearformBranchTable = ClearformBranchTable::of::<ControlNetFile>();
/// The model of tests/fixtures/controlnet.
const CONFIG: &str = include_str!("../../tests/fixtures/controlnet/base/config.json");

fuzz_target!(|bytes: &[u8]| {
    let Some(open) = TABLE.open else { return };
    let base = ClearformBase {
        struct_size: size_of::<ClearformBase>() as u32,
        reserved: 0,
        family: ClearformText::new("flux"),
        config: ClearformText::new(CONFIG),
        attention: ClearformText::new("clear:r=2"),
    };
    // SAFETY: host, file, base and the place for the instance live during the call.
    open_adapter(bytes, |host, file, instance| unsafe { open(host, file, &raw const base, instance) }, use_instance);
});

fn use_instance(instance: *mut c_void, _: usize) {
    let (Some(describe), Some(close)) = (TABLE.info, TABLE.close) else { return };
    let struct_size = size_of::<ClearformBranchInfo>() as u32;
    let mut info = ClearformBranchInfo { struct_size, control: 0, channels: 0, modes: 0, low: 0.0, high: 0.0 };
    // SAFETY: the instance is open until the last of these calls, and the struct is ours.
    unsafe {
        assert_eq!(describe(instance, &raw mut info), OK);
        close(instance);
    }
}
