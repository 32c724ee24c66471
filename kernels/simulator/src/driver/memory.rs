//! Memory and copies.

use super::{ILLEGAL_ADDRESS, INVALID_VALUE, OK, OUT_OF_MEMORY, handle, interface, return_value};
use crate::memory;
use crate::report::{count, problem};
use std::ffi::{c_int, c_void};
use std::ptr::copy;

interface! {
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        // The driver has no empty allocations either.
        if bytes == 0 {
            problem("an allocation of 0 bytes");
            return INVALID_VALUE;
        }
        match memory::allocate(bytes) {
            0 => OUT_OF_MEMORY,
            // SAFETY: the caller's promise.
            found => unsafe { return_value(address, found) },
        }
    }
    fn cuMemAllocAsync(address: *mut u64, bytes: usize, _stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemAlloc_v2(address, bytes) }
    }
    fn cuDeviceGetDefaultMemPool(pool: *mut *mut c_void, _device: c_int) {
        // SAFETY: the caller's promise.
        unsafe { return_value(pool, handle()) }
    }
    fn cuMemPoolSetAttribute(_pool: *mut c_void, _attribute: c_int, _value: *mut c_void) { OK }
    fn cuMemHostAlloc(address: *mut u64, bytes: usize, _flags: u32) {
        // SAFETY: the caller's promise.
        unsafe { cuMemAlloc_v2(address, bytes) }
    }
    fn cuMemFree_v2(address: u64) {
        if memory::free(address) { OK } else { ILLEGAL_ADDRESS }
    }
    fn cuMemFreeAsync(address: u64, _stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemFree_v2(address) }
    }
    fn cuMemFreeHost(address: u64) {
        // SAFETY: the caller's promise.
        unsafe { cuMemFree_v2(address) }
    }
    fn cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) {
        if !memory::holds(to, bytes) {
            return ILLEGAL_ADDRESS;
        }
        count("bytes to the device", bytes);
        // SAFETY: the device range is allocated; the host range is the caller's promise.
        unsafe { copy(from, to as *mut u8, bytes) };
        OK
    }
    fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) {
        if !memory::holds(from, bytes) {
            return ILLEGAL_ADDRESS;
        }
        count("bytes from the device", bytes);
        // SAFETY: the same.
        unsafe { copy(from as *const u8, to, bytes) };
        OK
    }
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, _stream: *mut c_void) {
        if !memory::holds(from, bytes) || !memory::holds(to, bytes) {
            return ILLEGAL_ADDRESS;
        }
        // SAFETY: both ranges are allocated.
        unsafe { copy(from as *const u8, to as *mut u8, bytes) };
        OK
    }
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, _stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemcpyHtoD_v2(to, from, bytes) }
    }
    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, _stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemcpyDtoH_v2(to, from, bytes) }
    }
    fn cuMemcpyPeerAsync(to: u64, _there: *mut c_void, from: u64, _here: *mut c_void, bytes: usize, stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemcpyDtoDAsync_v2(to, from, bytes, stream) }
    }
    fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, _stream: *mut c_void) {
        if !memory::holds(to, bytes) {
            return ILLEGAL_ADDRESS;
        }
        // SAFETY: the range is allocated.
        unsafe { (to as *mut u8).write_bytes(value, bytes) };
        OK
    }
}
