//! [`Instance`]: what a plugin's instance pointer points to, and what every function of a table does alike.

use super::Result;
use crate::{ClearformHost, ClearformText, FAILED, OK};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a plugin's instance pointer points to.
pub(super) struct Instance<T> {
    pub host: *const ClearformHost,
    pub inner: T,
}

/// Runs `work`; an error or a panic is told to the host.
pub(super) fn guard(host: *const ClearformHost, work: impl FnOnce() -> Result<()>) -> i32 {
    let reason = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return OK,
        Ok(Err(reason)) => reason,
        Err(panic) => format!("it panicked: {}", panic_text(panic.as_ref())),
    };
    // SAFETY: the host is lent until close; the text stands during the call.
    unsafe {
        if let Some(host) = host.as_ref()
            && let Some(fail) = host.fail
        {
            fail(host.context, ClearformText::new(&reason));
        }
    }
    FAILED
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it did not say why")
}

/// # Safety
/// `out` is where the host wants an instance.
pub(super) unsafe fn put<T>(host: *const ClearformHost, inner: T, out: *mut *mut c_void) {
    // SAFETY: the caller says so.
    unsafe { *out = Box::into_raw(Box::new(Instance { host, inner })).cast() }
}

/// # Safety
/// `instance` was made by `put` of the same type and is not closed.
pub(super) unsafe fn instance<'a, T>(instance: *mut c_void) -> &'a Instance<T> {
    // SAFETY: the caller says so.
    unsafe { &*instance.cast::<Instance<T>>() }
}

/// Closes an instance of `T`, as both tables have it.
///
/// # Safety
/// `instance` was made by `put` of the same type, and nobody uses it after this.
pub(super) unsafe extern "C" fn close<T>(instance: *mut c_void) {
    // A panic while dropping must not cross; there is nobody left to tell.
    // SAFETY: the caller says so.
    let _ = catch_unwind(AssertUnwindSafe(|| unsafe { drop(Box::from_raw(instance.cast::<Instance<T>>())) }));
}

/// Writes `value` as far as the host's struct goes: an older host has a shorter one. Its size it keeps.
///
/// # Safety
/// `out` is valid for `size` bytes, and `T` begins with its size, a u32.
pub(super) unsafe fn write<T>(out: *mut T, value: T, size: u32) {
    let bytes = (size as usize).min(size_of::<T>());
    let after_size = size_of::<u32>();
    if bytes > after_size {
        let from = (&raw const value).cast::<u8>();
        // SAFETY: the caller says so.
        unsafe {
            std::ptr::copy_nonoverlapping(from.add(after_size), out.cast::<u8>().add(after_size), bytes - after_size)
        };
    }
    // What was copied is the host's now.
    std::mem::forget(value);
}
