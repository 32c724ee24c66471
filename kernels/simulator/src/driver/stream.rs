//! Streams and events. Work is done when a call returns, so both are no more than clocks.

use super::{OK, handle, interface, return_value};
use std::ffi::{c_int, c_void};
use std::time::Instant;

interface! {
    fn cuStreamCreate(stream: *mut *mut c_void, _flags: u32) {
        // SAFETY: the caller's promise.
        unsafe { return_value(stream, handle()) }
    }
    fn cuStreamDestroy_v2(_stream: *mut c_void) { OK }
    fn cuStreamSynchronize(_stream: *mut c_void) { OK }
    fn cuStreamWaitEvent(_stream: *mut c_void, _event: *mut c_void, _flags: u32) { OK }
    fn cuStreamIsCapturing(_stream: *mut c_void, status: *mut c_int) {
        // SAFETY: the caller's promise.
        unsafe { return_value(status, 0) }
    }
    fn cuEventCreate(event: *mut *mut Instant, _flags: u32) {
        // SAFETY: the caller's promise.
        unsafe { return_value(event, Box::into_raw(Box::new(Instant::now()))) }
    }
    fn cuEventDestroy_v2(event: *mut Instant) {
        // SAFETY: made by `cuEventCreate`.
        drop(unsafe { Box::from_raw(event) });
        OK
    }
    fn cuEventRecord(event: *mut Instant, _stream: *mut c_void) {
        // SAFETY: made by `cuEventCreate`.
        unsafe { return_value(event, Instant::now()) }
    }
    fn cuEventSynchronize(_event: *mut Instant) { OK }
    fn cuEventElapsedTime(milliseconds: *mut f32, begin: *mut Instant, end: *mut Instant) {
        // SAFETY: both made by `cuEventCreate`.
        unsafe { return_value(milliseconds, (*end).duration_since(*begin).as_secs_f32() * 1e3) }
    }
}
