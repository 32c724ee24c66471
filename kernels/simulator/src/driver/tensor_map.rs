//! `cuTensorMapEncodeTiled`

use super::{INVALID_VALUE, OK, interface};
use crate::device::device;
use crate::report::problem;
use crate::tensor_map::{EncodeRequest, TensorMap};
use std::ffi::{c_int, c_void};
use std::slice::from_raw_parts;

interface! {
    fn cuTensorMapEncodeTiled(
        map: *mut TensorMap, data_type: c_int, rank: u32, address: *mut c_void, sizes: *const u64, strides: *const u64,
        box_sizes: *const u32, element_strides: *const u32, interleave: c_int, swizzle: c_int, promotion: c_int, fill: c_int
    ) {
        let stride_count = rank.saturating_sub(1) as usize;
        let missing = sizes.is_null() || box_sizes.is_null() || element_strides.is_null()
            || stride_count > 0 && strides.is_null();
        if missing || map.is_null() || !(map as usize).is_multiple_of(64) || !(1..=5).contains(&rank) {
            problem("a tensor map is misaligned or not of rank 1 to 5, or an argument is missing");
            return INVALID_VALUE;
        }
        if device().capability < 90 {
            problem("a tensor map: the device has no bulk tensor copies");
            return INVALID_VALUE;
        }
        let rank = rank as usize;
        // SAFETY: none is null, and the caller promises `rank` elements of each, and one stride less.
        let request = unsafe {
            EncodeRequest {
                data_type,
                address: address as u64,
                sizes: from_raw_parts(sizes, rank),
                strides: if stride_count > 0 { from_raw_parts(strides, stride_count) } else { &[] },
                box_sizes: from_raw_parts(box_sizes, rank),
                element_strides: from_raw_parts(element_strides, rank),
                interleave,
                swizzle,
                promotion,
                fill,
            }
        };
        if let Some(text) = request.problem() {
            problem(&format!("a tensor map: {text}"));
            return INVALID_VALUE;
        }
        // SAFETY: the caller provides 128 bytes.
        unsafe { map.write(TensorMap::new(&request)) };
        OK
    }
}
