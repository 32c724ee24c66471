//! A safetensors file: as it is, and with the length of its header corrected, which random changes rarely leave right.
#![no_main]

use clearform_fuzz::open;
use libfuzzer_sys::fuzz_target;

const LENGTH: usize = 8;

fuzz_target!(|bytes: &[u8]| {
    open("file.safetensors", bytes);
    let text = bytes.get(LENGTH..).unwrap_or_default();
    if let Some(last) = text.iter().rposition(|&byte| byte == b'}') {
        open("file.safetensors", &[&(last as u64 + 1).to_le_bytes(), text].concat());
    }
});
