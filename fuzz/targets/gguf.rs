//! A GGUF file.
#![no_main]

use clearform_fuzz::open;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| open("file.gguf", bytes));
