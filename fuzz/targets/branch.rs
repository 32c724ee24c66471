//! A ControlNet's file through its plugin, for a tiny model: what it takes. Of a safetensors file only the header counts.
#![no_main]

use clearform_plugin_abi::{Base, BranchInfo, BranchTable, OK, Text};
use clearform_controlnet::ControlNet;
use clearform_fuzz::lend::opened;
use libfuzzer_sys::fuzz_target;
use std::ffi::c_void;

static TABLE: BranchTable = BranchTable::of::<ControlNet>();
/// The model of tests/fixtures/controlnet.
const CONFIG: &str = include_str!("../../tests/fixtures/controlnet/base/config.json");

fuzz_target!(|bytes: &[u8]| {
    let Some(open) = TABLE.open else { return };
    let base = Base {
        struct_size: size_of::<Base>() as u32,
        reserved: 0,
        family: Text::new("flux"),
        config: Text::new(CONFIG),
        attention: Text::new("clear:r=2"),
    };
    // SAFETY: host, file, base and room for the instance stand during the call.
    opened(bytes, |host, file, instance| unsafe { open(host, file, &raw const base, instance) }, used);
});

fn used(instance: *mut c_void, _: usize) {
    let (Some(tell), Some(close)) = (TABLE.info, TABLE.close) else { return };
    let struct_size = size_of::<BranchInfo>() as u32;
    let mut info = BranchInfo { struct_size, control: 0, channels: 0, modes: 0, low: 0.0, high: 0.0 };
    // SAFETY: the instance is open until the last of these calls, and the struct is ours.
    unsafe {
        assert_eq!(tell(instance, &raw mut info), OK);
        close(instance);
    }
}
