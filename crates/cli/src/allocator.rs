//! [`ProgramAllocator`]: the system's allocator, which ends the program with a message where Rust's would abort it, and asks
//! for huge pages.

use crate::huge_pages;
use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator.
pub struct ProgramAllocator;

// SAFETY: every call is passed on to the system's allocator as it is; a call that fails does not return.
unsafe impl GlobalAlloc for ProgramAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of this function, which is the same.
        given(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        given(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        given(unsafe { System.realloc(memory, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) };
    }
}

fn given(memory: *mut u8, size: usize) -> *mut u8 {
    if memory.is_null() {
        stop(size);
    }
    huge_pages::advise(memory, size);
    memory
}

/// Ends the program as after any error. What is written appears under its name only when it is complete, so nothing is
/// left half done.
#[cold]
fn stop(size: usize) -> ! {
    let mut digits = [0; 20];
    let text = [
        b"error: out of memory: the system refused ".as_slice(),
        decimal(size, &mut digits),
        b" more bytes; pass --offload always to generate, choose a smaller size, batch, number of steps or number format, \
          or raise the limit (ulimit -v, the control group)\n",
    ];
    write_to_stderr(&text);
    exit()
}

/// The digits of `number`, without an allocation.
fn decimal(mut number: usize, digits: &mut [u8; 20]) -> &[u8] {
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[first..];
        }
    }
}

#[cfg(unix)]
fn write_to_stderr(texts: &[&[u8]]) {
    for text in texts {
        // SAFETY: the bytes are readable. If they cannot be written, nothing else can be done.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    }
}

#[cfg(unix)]
fn exit() -> ! {
    // SAFETY: it ends the process at once; nothing runs after it that could find memory in the middle of a change.
    unsafe { libc::_exit(1) }
}

#[cfg(not(unix))]
fn write_to_stderr(texts: &[&[u8]]) {
    use std::io::Write as _;
    texts.iter().for_each(|text| drop(std::io::stderr().write_all(text)));
}

#[cfg(not(unix))]
fn exit() -> ! {
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_decimal() {
        for number in [0, 7, 10, 113_246_208, usize::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
        }
    }
}
