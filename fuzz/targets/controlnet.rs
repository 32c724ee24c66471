//! A ControlNet file through its plugin, for a tiny model of each family: the control input it expects. Only the header
//! of the file matters.
#![no_main]

use clearform_controlnet::ControlNetFile;
use clearform_fuzz::lend::open_adapter;
use clearform_plugin_abi::{ClearformBase, ClearformBranchInfo, ClearformBranchTable, ClearformText, OK};
use libfuzzer_sys::fuzz_target;
use std::ffi::c_void;

static TABLE: ClearformBranchTable = ClearformBranchTable::of::<ControlNetFile>();
/// The models of the fixtures.
const MODELS: [(&str, &str); 2] = [
    ("flux", include_str!("../../tests/fixtures/controlnet/base/config.json")),
    ("sd3", include_str!("../../tests/fixtures/controlnet-sd3/base/config.json")),
];

fuzz_target!(|bytes: &[u8]| {
    let Some(open) = TABLE.open else { return };
    for (family, config) in MODELS {
        let base = ClearformBase {
            struct_size: size_of::<ClearformBase>() as u32,
            reserved: 0,
            family: ClearformText::new(family),
            config: ClearformText::new(config),
            attention: ClearformText::new("clear:r=2"),
        };
        // SAFETY: host, file, base and the place for the instance live during the call.
        let open = |host, file, instance| unsafe { open(host, file, &raw const base, instance) };
        open_adapter(bytes, open, use_instance);
    }
});

fn use_instance(instance: *mut c_void, _: usize) {
    let (Some(describe), Some(close)) = (TABLE.info, TABLE.close) else { return };
    let mut info = ClearformBranchInfo::EMPTY;
    // SAFETY: the instance is open until the last of these calls, and the struct is ours.
    unsafe {
        assert_eq!(describe(instance, &raw mut info), OK);
        close(instance);
    }
}
