//! [`Instance`], which an instance pointer points to, and what the functions of both tables have in common.

use super::Result;
use crate::{ClearformHost, ClearformText, FAILED, OK};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// An open file of the plugin `T`, with the host that opened it.
pub(super) struct Instance<T> {
    pub host: *const ClearformHost,
    pub plugin: T,
}

/// Runs `work` and returns its status; passes an error or a panic to the host.
pub(super) fn guard(host: *const ClearformHost, work: impl FnOnce() -> Result<()>) -> i32 {
    let reason = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return OK,
        Ok(Err(reason)) => reason,
        Err(panic) => format!("the plugin panicked: {}", panic_message(panic.as_ref())),
    };
    // SAFETY: the host is valid until close, and the text during the call.
    unsafe {
        if let Some(host) = host.as_ref()
            && let Some(fail) = host.fail
        {
            fail(host.context, ClearformText::new(&reason));
        }
    }
    FAILED
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// Stores a new instance in `out`.
///
/// # Safety
/// `out` is valid for writing.
pub(super) unsafe fn store_instance<T>(host: *const ClearformHost, plugin: T, out: *mut *mut c_void) {
    // SAFETY: guaranteed by the caller.
    unsafe { *out = Box::into_raw(Box::new(Instance { host, plugin })).cast() }
}

/// # Safety
/// `pointer` comes from [`store_instance`] of the same type and is not closed.
pub(super) unsafe fn instance<'a, T>(pointer: *mut c_void) -> &'a Instance<T> {
    // SAFETY: guaranteed by the caller.
    unsafe { &*pointer.cast::<Instance<T>>() }
}

/// The `close` of both tables.
///
/// # Safety
/// `pointer` comes from [`store_instance`] of the same type, and is not used after this.
pub(super) unsafe extern "C" fn close<T>(pointer: *mut c_void) {
    // A panic while dropping must not cross the interface, and `close` has no way to report it.
    // SAFETY: guaranteed by the caller.
    let _ = catch_unwind(AssertUnwindSafe(|| unsafe { drop(Box::from_raw(pointer.cast::<Instance<T>>())) }));
}

/// Copies `value` to the host's struct, except for its size field, and only up to `size`: an older host has a shorter
/// struct.
///
/// # Safety
/// `out` is valid for `size` bytes, and `T` begins with its size, a u32.
pub(super) unsafe fn copy_to_host<T>(out: *mut T, value: T, size: u32) {
    let bytes = (size as usize).min(size_of::<T>());
    let after_size = size_of::<u32>();
    if bytes > after_size {
        let from = (&raw const value).cast::<u8>();
        // SAFETY: guaranteed by the caller.
        unsafe {
            std::ptr::copy_nonoverlapping(from.add(after_size), out.cast::<u8>().add(after_size), bytes - after_size)
        };
    }
    // The host owns what was copied.
    std::mem::forget(value);
}

/// A copy of the host's struct, as far as the host knows it; the rest is that of `empty`: an older host has a shorter
/// struct.
///
/// # Safety
/// `pointer` is valid for as many bytes as its first field, a u32, states, and any bytes of the host are a valid `T`.
pub(super) unsafe fn copy_from_host<T>(pointer: *const T, mut empty: T) -> T {
    // SAFETY: guaranteed by the caller.
    let size = unsafe { *pointer.cast::<u32>() } as usize;
    let bytes = size.min(size_of::<T>());
    // SAFETY: guaranteed by the caller; `empty` has at least as many bytes.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut empty).cast::<u8>(), bytes) };
    empty
}
