//! A LoRA file through its plugin: the list of edits, and the tensors of each. Only the header of the file matters.
#![no_main]

use clearform_fuzz::lend::open_adapter;
use clearform_lora::LoraFile;
use clearform_plugin_abi::tensor::OwnedTensor;
use clearform_plugin_abi::{ClearformAdapterTable, ClearformEdit, ClearformEditTensors, OK};
use libfuzzer_sys::fuzz_target;
use std::ffi::c_void;

static TABLE: ClearformAdapterTable = ClearformAdapterTable::of::<LoraFile>();

fuzz_target!(|bytes: &[u8]| {
    let Some(open) = TABLE.open else { return };
    // SAFETY: host, file and the place for the instance live during the call.
    open_adapter(bytes, |host, file, instance| unsafe { open(host, file, instance) }, use_instance);
});

fn use_instance(instance: *mut c_void, tensors: usize) {
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
    let mut edit = ClearformEdit::EMPTY;
    let mut given = ClearformEditTensors::EMPTY;
    // SAFETY: the caller guarantees that the instance is open; the structs are ours, and so are the tensors returned.
    unsafe {
        assert_eq!(describe(instance, index, &raw mut edit), OK);
        let _ = give(instance, index, &raw mut given);
        let tensors = [given.down, given.up, given.value, given.magnitude];
        tensors.into_iter().filter(|tensor| !tensor.is_null()).for_each(|tensor| drop(OwnedTensor::from_raw(tensor)));
    }
}
