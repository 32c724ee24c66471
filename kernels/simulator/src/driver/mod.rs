//! The CUDA driver API, as far as it is used: one device, on which all work is done when a call returns.

mod context;
mod copy_2d;
mod memory;
mod module;
mod stream;
mod tensor_map;

pub use context::*;
pub use copy_2d::*;
pub use memory::*;
pub use module::*;
pub use stream::*;
pub use tensor_map::*;

use std::ffi::{c_int, c_void};

pub(crate) const OK: c_int = 0;
pub(crate) const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const INVALID_DEVICE: c_int = 101;
const NO_BINARY_FOR_GPU: c_int = 209;
const INVALID_PTX: c_int = 218;
const NOT_FOUND: c_int = 500;
const ILLEGAL_ADDRESS: c_int = 700;
const LAUNCH_FAILED: c_int = 719;
const NOT_SUPPORTED: c_int = 801;

/// The most bytes from one row of a copy to the next, `CU_DEVICE_ATTRIBUTE_MAX_PITCH`.
const MAX_PITCH: usize = i32::MAX as usize;

/// A handle that is not null. There is one context, and streams do not differ.
pub(crate) fn handle() -> *mut c_void {
    std::ptr::dangling_mut::<u64>().cast()
}

/// Writes a result to an out-pointer.
///
/// # Safety
/// `to` is null or valid for writes.
pub(crate) unsafe fn return_value<T>(to: *mut T, value: T) -> c_int {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    OK
}

/// Defines C functions that return a status.
macro_rules! interface {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $body:block)*) => { $(
        /// See the function of this name in NVIDIA's documentation.
        ///
        /// # Safety
        /// Pointers must be valid, as that documentation demands.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, clippy::too_many_arguments)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> c_int $body
    )* };
}

pub(crate) use interface;
