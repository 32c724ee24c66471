//! [`open_adapter`]: opens bytes as an adapter file, the way the host does for a plugin. The plugin's code is linked into the
//! target, not loaded as a library, so that the fuzzer sees its coverage.

use crate::SCRATCH;
use clearform_plugin_abi::{ABI_MAJOR, ClearformFile, ClearformHost, ClearformText, OK};
use clearform_weights::{Checkpoint, Dtype};
use file::PluginFile;
use serde_json::{Map, Value, json};
use std::ffi::c_void;
use std::sync::Arc;

// Private to the host.
#[allow(dead_code)]
#[path = "../../crates/plugin-host/src/file.rs"]
mod file;

/// Enough for any adapter of a tiny model.
const MOST_VALUES: u64 = 1 << 20;
/// 1.5 in f32, and a finite value in every other dtype.
const VALUES: [u8; 4] = [0, 0, 0xc0, 0x3f];

/// Opens `bytes` as an adapter file with the plugin's own function `open`, and passes the instance to `use_instance`.
pub fn open_adapter(
    bytes: &[u8],
    open: impl FnOnce(*const ClearformHost, *const ClearformFile, *mut *mut c_void) -> i32,
    use_instance: impl FnOnce(*mut c_void, usize),
) {
    let Some(file) = with_offsets(bytes) else { return };
    let Ok(checkpoint) = Checkpoint::open(SCRATCH.write("adapter.safetensors", &file)) else { return };
    let host = host();
    let Ok(file) = PluginFile::new(Arc::new(checkpoint), String::new()) else { return };
    let mut instance = std::ptr::null_mut();
    if open(&raw const host, file.table(), &raw mut instance) == OK {
        use_instance(instance, file.names().len());
    }
}

/// A safetensors file of the tensors in the header in `bytes`, with offsets that fit their shapes: random changes would
/// hardly ever leave offsets valid, and they are not what this target tests.
fn with_offsets(bytes: &[u8]) -> Option<Vec<u8>> {
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

/// Bytes of a tensor.
fn size(entry: &Value) -> Option<u64> {
    let dtype: Dtype = serde_json::from_value(entry.get("dtype")?.clone()).ok()?;
    let extents = entry.get("shape")?.as_array()?.iter().map(Value::as_u64);
    let elements = extents.into_iter().try_fold(1u64, |product, extent| product.checked_mul(extent?))?;
    Some(elements.checked_mul(dtype.bitsize() as u64)? / 8)
}

/// A host that ignores messages.
fn host() -> ClearformHost {
    ClearformHost {
        abi_major: ABI_MAJOR,
        struct_size: size_of::<ClearformHost>() as u32,
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

unsafe extern "C" fn log(_: *mut c_void, _: u32, _: ClearformText) {}

unsafe extern "C" fn fail(_: *mut c_void, _: ClearformText) {}
