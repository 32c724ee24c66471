//! The device, its context and its attributes.

use super::{
    ILLEGAL_ADDRESS, INVALID_DEVICE, INVALID_VALUE, LAUNCH_FAILED, MAX_PITCH, NO_BINARY_FOR_GPU, NOT_FOUND,
    NOT_SUPPORTED, OK, OUT_OF_MEMORY, handle, interface, return_value,
};
use crate::device::device;
use crate::instruction::WARP_SIZE;
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::ptr::{copy, null_mut};

thread_local! {
    static CONTEXT: Cell<*mut c_void> = const { Cell::new(null_mut()) };
}

interface! {
    fn cuInit(_flags: u32) { OK }
    fn cuDriverGetVersion(version: *mut c_int) {
        // SAFETY: the caller's promise.
        unsafe { return_value(version, 13000) }
    }
    fn cuDeviceGet(device: *mut c_int, number: c_int) {
        if number != 0 {
            return INVALID_DEVICE;
        }
        // SAFETY: the caller's promise.
        unsafe { return_value(device, 0) }
    }
    fn cuDeviceGetCount(count: *mut c_int) {
        // SAFETY: the caller's promise.
        unsafe { return_value(count, 1) }
    }
    fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) {
        let text = device().name;
        if (length as usize) < text.count_bytes() + 1 {
            return INVALID_VALUE;
        }
        // SAFETY: `name` has `length` bytes, which is enough.
        unsafe { copy(text.as_ptr(), name, text.count_bytes() + 1) };
        OK
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) {
        let found = match attribute {
            1..=3 => 1024, // threads of a block; along x and y
            4 => 64,       // threads along z
            5 => i32::MAX, // blocks along x
            6 | 7 => 65535, // blocks along y and z
            8 => 48 << 10, // shared memory of a block, unless a kernel asks for more
            10 => WARP_SIZE as c_int,
            11 => MAX_PITCH as c_int,
            16 => 108,     // multiprocessors
            75 => (device().capability / 10) as c_int,
            76 => (device().capability % 10) as c_int,
            97 => device().shared_bytes as c_int,
            115 => 1,      // memory pools
            _ => 0,
        };
        // SAFETY: the caller's promise.
        unsafe { return_value(value, found) }
    }
    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) {
        // SAFETY: the caller's promise.
        unsafe { return_value(context, handle()) }
    }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { OK }
    fn cuCtxDestroy_v2(_context: *mut c_void) { OK }
    fn cuCtxSynchronize() { OK }
    fn cuCtxSetCurrent(context: *mut c_void) {
        CONTEXT.set(context);
        OK
    }
    fn cuCtxGetCurrent(context: *mut *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { return_value(context, CONTEXT.get()) }
    }
    fn cuGetErrorString(error: c_int, text: *mut *const c_char) {
        let words = match error {
            OK => c"no error",
            INVALID_VALUE => c"invalid argument",
            OUT_OF_MEMORY => c"out of memory",
            NO_BINARY_FOR_GPU => c"no code for this device",
            NOT_FOUND => c"not found",
            ILLEGAL_ADDRESS => c"address is not allocated",
            LAUNCH_FAILED => c"a kernel failed; the simulator printed where",
            NOT_SUPPORTED => c"not supported",
            _ => c"unknown error",
        };
        // SAFETY: the caller's promise.
        unsafe { return_value(text, words.as_ptr()) }
    }
}
