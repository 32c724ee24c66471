//! [`opened`]: a file lent to a plugin as the host lends it. The plugin's code is part of the target, not a library that
//! is loaded, so that the fuzzer sees its way through it.

use crate::SCRATCH;
use clearform_plugin_abi::{ABI_MAJOR, Host, Text};
use clearform_weights::{Checkpoint, Dtype};
use file::LentFile;
use serde_json::{Map, Value, json};
use std::ffi::c_void;
use std::sync::Arc;

// The host keeps it to itself.
#[allow(dead_code)]
#[path = "../../crates/plugin-host/src/file.rs"]
mod file;

/// Enough for any adapter of a tiny model.
const MOST_VALUES: u64 = 1 << 20;
/// 1.5 in f32, and some number in any other format.
const VALUES: [u8; 4] = [0, 0, 0xc0, 0x3f];

/// Opens `bytes` as an adapter's file; `open` is the plugin's own function, and `used` gets its instance.
pub fn opened(
    bytes: &[u8],
    open: impl FnOnce(*const Host, *const clearform_plugin_abi::File, *mut *mut c_void) -> i32,
    used: impl FnOnce(*mut c_void, usize),
) {
    let Some(file) = framed(bytes) else { return };
    let Ok(checkpoint) = Checkpoint::open(SCRATCH.write("adapter.safetensors", &file)) else { return };
    let host = host();
    let file = LentFile::new(Arc::new(checkpoint));
    let mut instance = std::ptr::null_mut();
    if open(&raw const host, file.table(), &raw mut instance) == clearform_plugin_abi::OK {
        used(instance, file.names().len());
    }
}

/// A safetensors file of the tensors that the header in `bytes` names, each with as many values as its shape asks for:
/// offsets that are right are not what an adapter is about, and few changes would keep them so.
fn framed(bytes: &[u8]) -> Option<Vec<u8>> {
    let (begin, end) = (bytes.iter().position(|&byte| byte == b'{')?, bytes.iter().rposition(|&byte| byte == b'}')?);
    let mut header: Map<String, Value> = serde_json::from_slice(bytes.get(begin..=end)?).ok()?;
    let mut offset = 0;
    for (_, entry) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        let next = offset + size(entry).filter(|size| *size <= MOST_VALUES)?;
        entry.as_object_mut()?.insert("data_offsets".to_owned(), json!([offset, next]));
        offset = next;
    }
    let header = Value::Object(header).to_string();
    let values = VALUES.iter().copied().cycle().take(usize::try_from(offset).ok().filter(|_| offset <= MOST_VALUES)?);
    Some((header.len() as u64).to_le_bytes().into_iter().chain(header.into_bytes()).chain(values).collect())
}

/// Bytes that a tensor takes.
fn size(entry: &Value) -> Option<u64> {
    let dtype: Dtype = serde_json::from_value(entry.get("dtype")?.clone()).ok()?;
    let extents = entry.get("shape")?.as_array()?.iter().map(Value::as_u64);
    let elements = extents.into_iter().try_fold(1u64, |product, extent| product.checked_mul(extent?))?;
    Some(elements.checked_mul(dtype.bitsize() as u64)? / 8)
}

/// A host that hears nothing.
fn host() -> Host {
    Host {
        abi_major: ABI_MAJOR,
        struct_size: size_of::<Host>() as u32,
        context: std::ptr::null_mut(),
        threads: 1,
        reserved: 0,
        allocate: None,
        release: None,
        log: Some(log),
        progress: None,
        fail: Some(fail),
    }
}

unsafe extern "C" fn log(_: *mut c_void, _: u32, _: Text) {}

unsafe extern "C" fn fail(_: *mut c_void, _: Text) {}
