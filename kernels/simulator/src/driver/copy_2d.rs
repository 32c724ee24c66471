//! `cuMemcpy2DAsync_v2`, between device memory only.

use super::{ILLEGAL_ADDRESS, INVALID_VALUE, MAX_PITCH, NOT_SUPPORTED, OK, interface};
use crate::memory;
use crate::report::problem;
use std::ffi::{c_int, c_void};
use std::ptr::copy;

/// `CU_MEMORYTYPE_DEVICE`
const DEVICE: c_int = 2;
/// `CUmemorytype` counts from 1 to this.
const LAST_MEMORY_TYPE: c_int = 4;

/// One side of a copy, as it is laid out in [`Copy2D`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Side {
    /// Bytes of a row before the first that is copied.
    pub x_bytes: usize,
    /// Rows before the first that is copied.
    pub y: usize,
    /// `CUmemorytype`
    pub memory_type: c_int,
    /// Address in host memory.
    pub host: *mut c_void,
    /// Address in device memory.
    pub device: u64,
    /// `CUarray`
    pub array: *mut c_void,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

/// `CUDA_MEMCPY2D`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Copy2D {
    /// Where the rows are.
    pub from: Side,
    /// Where they go.
    pub to: Side,
    /// Bytes of a row that are copied.
    pub width_bytes: usize,
    /// Rows that are copied.
    pub height: usize,
}

impl Side {
    /// Address of the first byte that is copied.
    ///
    /// # Errors
    /// The status with which the driver refuses such a side.
    fn first(&self, width_bytes: usize, height: usize) -> Result<u64, c_int> {
        if self.memory_type != DEVICE {
            let exists = (1..=LAST_MEMORY_TYPE).contains(&self.memory_type);
            return Err(if exists { NOT_SUPPORTED } else { INVALID_VALUE });
        }
        let row_end = self.x_bytes.checked_add(width_bytes).ok_or(INVALID_VALUE)?;
        if self.pitch > MAX_PITCH || self.pitch < row_end {
            return Err(INVALID_VALUE);
        }
        self.allocated(width_bytes, height).ok_or(ILLEGAL_ADDRESS)
    }

    /// The same, if all rows lie within one allocation.
    fn allocated(&self, width_bytes: usize, height: usize) -> Option<u64> {
        let offset = self.y.checked_mul(self.pitch)?.checked_add(self.x_bytes)?;
        let first = self.device.checked_add(offset as u64)?;
        let bytes = height.saturating_sub(1).checked_mul(self.pitch)?.checked_add(width_bytes)?;
        (width_bytes == 0 || height == 0 || memory::holds(first, bytes)).then_some(first)
    }
}

interface! {
    fn cuMemcpy2DAsync_v2(request: *const Copy2D, _stream: *mut c_void) {
        // SAFETY: null, or the caller's promise.
        let Some(request) = (unsafe { request.as_ref() }) else { return INVALID_VALUE };
        let Copy2D { from, to, width_bytes, height } = *request;
        let sides = from.first(width_bytes, height).and_then(|first| Ok((first, to.first(width_bytes, height)?)));
        let (first_from, first_to) = match sides {
            Ok(found) => found,
            Err(status) => {
                problem(&format!("a copy of rows is refused: {request:?}"));
                return status;
            }
        };
        if width_bytes == 0 {
            return OK;
        }
        for row in 0..height {
            let (from, to) = (first_from + (row * from.pitch) as u64, first_to + (row * to.pitch) as u64);
            // SAFETY: both rows are allocated.
            unsafe { copy(from as *const u8, to as *mut u8, width_bytes) };
        }
        OK
    }
}
