//! A LoRA's file through its plugin: the list of edits, and the tensors of each. Of a safetensors file only the header
//! counts.
#![no_main]

use clearform_plugin_abi::tensor::OwnedTensor;
use clearform_plugin_abi::{AdapterTable, Edit, EditTensors, OK};
use clearform_fuzz::lend::opened;
use clearform_lora::Lora;
use libfuzzer_sys::fuzz_target;
use std::ffi::c_void;

static TABLE: AdapterTable = AdapterTable::of::<Lora>();

fuzz_target!(|bytes: &[u8]| {
    let Some(open) = TABLE.open else { return };
    // SAFETY: host, file and room for the instance stand during the call.
    opened(bytes, |host, file, instance| unsafe { open(host, file, instance) }, used);
});

fn used(instance: *mut c_void, tensors: usize) {
    let (Some(count), Some(skipped), Some(close)) = (TABLE.edit_count, TABLE.skipped, TABLE.close) else { return };
    // SAFETY: the instance is open until the last of these calls.
    unsafe {
        (0..count(instance)).for_each(|index| edit(instance, index));
        assert!((0..tensors).all(|index| skipped(instance, index).as_str().is_some()));
        close(instance);
    }
}

/// # Safety
/// The instance is open.
unsafe fn edit(instance: *mut c_void, index: usize) {
    let (Some(describe), Some(give)) = (TABLE.edit, TABLE.edit_tensors) else { return };
    let (mut edit, mut given) = (Edit::EMPTY, EditTensors::EMPTY);
    // SAFETY: the caller says that the instance is open; the structs are ours, and so are the tensors that were given.
    unsafe {
        assert_eq!(describe(instance, index, &raw mut edit), OK);
        let _ = give(instance, index, &raw mut given);
        let tensors = [given.down, given.up, given.value, given.magnitude];
        tensors.into_iter().filter(|tensor| !tensor.is_null()).for_each(|tensor| drop(OwnedTensor::take(tensor)));
    }
}
