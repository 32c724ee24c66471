//! Large allocations, copies of rows, and modules that are no PTX.
#![allow(clippy::unwrap_used, missing_docs)]

use simulator::driver::{
    Copy2D, Side, cuDeviceGetAttribute, cuMemAlloc_v2, cuMemFree_v2, cuMemcpy2DAsync_v2, cuMemcpyDtoDAsync_v2,
    cuMemcpyDtoH_v2, cuMemcpyHtoD_v2, cuModuleLoadData, cuModuleLoadDataEx,
};
use std::ptr::null_mut;

const INVALID_VALUE: i32 = 1;
const OUT_OF_MEMORY: i32 = 2;
const NO_BINARY_FOR_GPU: i32 = 209;
const ILLEGAL_ADDRESS: i32 = 700;
const NOT_SUPPORTED: i32 = 801;

/// Device memory, which is freed when this is dropped.
struct Memory(u64);

impl Memory {
    fn new(bytes: usize) -> Self {
        let mut address = 0;
        // SAFETY: a pointer to a local.
        assert_eq!(unsafe { cuMemAlloc_v2(&raw mut address, bytes) }, 0, "{bytes} bytes");
        Self(address)
    }

    fn of(bytes: &[u8]) -> Self {
        let memory = Self::new(bytes.len());
        memory.write(0, bytes);
        memory
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        // SAFETY: the pointer is to this many bytes.
        assert_eq!(unsafe { cuMemcpyHtoD_v2(self.0 + at, bytes.as_ptr(), bytes.len()) }, 0);
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [1; N];
        // SAFETY: the pointer is to this many bytes.
        assert_eq!(unsafe { cuMemcpyDtoH_v2(bytes.as_mut_ptr(), self.0 + at, N) }, 0);
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing else frees it.
        assert_eq!(unsafe { cuMemFree_v2(self.0) }, 0);
    }
}

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn large_memory_is_zero_and_takes_only_what_is_used() {
    const LARGE: u64 = 8 << 30;
    let before = resident_bytes();
    let (large, other) = (Memory::new(LARGE as usize), Memory::new(LARGE as usize));
    assert!(large.0.is_multiple_of(256) && other.0.is_multiple_of(256));
    large.write(LARGE - 4, &[1, 2, 3, 4]);
    assert_eq!(large.read(LARGE - 8), [0, 0, 0, 0, 1, 2, 3, 4]);
    // SAFETY: both are allocated, or the call says that they are not.
    unsafe {
        assert_eq!(cuMemcpyDtoDAsync_v2(other.0 + LARGE - 4, large.0 + LARGE - 4, 4, null_mut()), 0);
        assert_eq!(cuMemcpyDtoDAsync_v2(other.0 + LARGE - 4, large.0 + LARGE - 4, 5, null_mut()), ILLEGAL_ADDRESS);
    }
    assert_eq!(other.read(LARGE - 4), [1, 2, 3, 4]);
    let taken = resident_bytes().saturating_sub(before);
    assert!(taken < 1 << 30, "{taken} bytes");
}

#[test]
fn memory_below_the_limit_is_nan() {
    const LIMIT: usize = 256 << 20;
    assert_eq!(Memory::new(LIMIT - 1).read(LIMIT as u64 - 5), [0xff; 4]);
    assert_eq!(Memory::new(LIMIT).read(LIMIT as u64 - 4), [0; 4]);
}

#[test]
fn more_than_can_be_addressed_is_refused() {
    let mut address = 0;
    for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
        // SAFETY: a pointer to a local.
        assert_eq!(unsafe { cuMemAlloc_v2(&raw mut address, bytes) }, OUT_OF_MEMORY);
    }
}

fn side(memory: &Memory, x_bytes: usize, y: usize, pitch: usize) -> Side {
    Side { x_bytes, y, memory_type: 2, host: null_mut(), device: memory.0, array: null_mut(), pitch }
}

fn copy_rows(from: Side, to: Side, width_bytes: usize, height: usize) -> i32 {
    let request = Copy2D { from, to, width_bytes, height };
    // SAFETY: a pointer to a local; addresses are checked.
    unsafe { cuMemcpy2DAsync_v2(&raw const request, null_mut()) }
}

#[test]
fn the_request_of_a_copy_is_laid_out_as_in_cuda_h() {
    use std::mem::offset_of;
    assert_eq!((size_of::<Copy2D>(), offset_of!(Copy2D, to), offset_of!(Copy2D, width_bytes)), (128, 56, 112));
    assert_eq!((offset_of!(Side, memory_type), offset_of!(Side, device), offset_of!(Side, pitch)), (16, 32, 48));
}

#[test]
fn rows_are_copied_from_one_pitch_to_another() {
    let numbers: Vec<u8> = (0..24).collect();
    let from = Memory::of(&numbers);
    let to = Memory::of(&[99; 15]);
    // Columns 2 to 4 of rows 1 and 2 of 8 go to columns 1 to 3 of rows 1 and 2 of 5.
    assert_eq!(copy_rows(side(&from, 2, 1, 8), side(&to, 1, 1, 5), 3, 2), 0);
    assert_eq!(to.read(0), [99, 99, 99, 99, 99, 99, 10, 11, 12, 99, 99, 18, 19, 20, 99]);
    // The last row may end with the allocation, short of the pitch.
    assert_eq!(copy_rows(side(&from, 0, 2, 8), side(&to, 0, 0, 15), 8, 1), 0);
    assert_eq!(to.read(0), [16, 17, 18, 19, 20, 21, 22, 23]);
    assert_eq!(copy_rows(side(&from, 6, 0, 8), side(&to, 3, 0, 5), 2, 3), 0);
    assert_eq!(to.read(13), [22, 23]);
    for (width, height) in [(0, 1000), (1, 0)] {
        assert_eq!(copy_rows(side(&from, 0, 0, 8), side(&to, 0, 0, 5), width, height), 0, "nothing to copy");
    }
    assert_eq!(to.read(0), [16, 17, 18, 6, 7]);
}

#[test]
fn rows_outside_of_an_allocation_are_not_copied() {
    let (from, to) = (Memory::of(&[1; 24]), Memory::of(&[2; 24]));
    let whole = |memory| side(memory, 0, 0, 8);
    for (x, y, height) in [(0, 0, 4), (1, 2, 2), (0, 3, 1), (0, usize::MAX / 8, 1), (0, 0, usize::MAX / 4)] {
        let moved = |memory| side(memory, x, y, 8);
        assert_eq!(copy_rows(moved(&from), whole(&to), 7, height), ILLEGAL_ADDRESS, "from {x}, {y}");
        assert_eq!(copy_rows(whole(&from), moved(&to), 7, height), ILLEGAL_ADDRESS, "to {x}, {y}");
    }
    assert_eq!(to.read(0), [2; 24]);
}

#[test]
fn a_copy_that_the_driver_refuses_is_refused() {
    let (from, to) = (Memory::of(&[1; 24]), Memory::of(&[2; 24]));
    let whole = |memory| side(memory, 0, 0, 8);
    let refused = [
        (side(&from, 0, 0, 7), 8, INVALID_VALUE),          // rows overlap
        (side(&from, 1, 0, 8), 8, INVALID_VALUE),          // a row goes on behind its pitch
        (side(&from, usize::MAX, 0, 8), 8, INVALID_VALUE), // so does this
        (side(&from, 0, 0, 1 << 31), 8, INVALID_VALUE),    // the pitch is too large
        (Side { memory_type: 0, ..whole(&from) }, 8, INVALID_VALUE),
        (Side { memory_type: 5, ..whole(&from) }, 8, INVALID_VALUE),
        (Side { memory_type: 1, ..whole(&from) }, 8, NOT_SUPPORTED), // host
        (Side { memory_type: 3, ..whole(&from) }, 8, NOT_SUPPORTED), // array
        (Side { memory_type: 4, ..whole(&from) }, 8, NOT_SUPPORTED), // unified
    ];
    for (bad, width, status) in refused {
        assert_eq!(copy_rows(bad, whole(&to), width, 1), status, "from {bad:?}");
        assert_eq!(copy_rows(whole(&from), Side { device: to.0, ..bad }, width, 1), status, "to {bad:?}");
    }
    // SAFETY: there is no request to read.
    assert_eq!(unsafe { cuMemcpy2DAsync_v2(std::ptr::null(), null_mut()) }, INVALID_VALUE);
    assert_eq!(to.read(0), [2; 24]);
}

#[test]
fn rows_are_copied_at_the_largest_pitch() {
    let mut pitch = 0;
    // SAFETY: a pointer to a local.
    assert_eq!(unsafe { cuDeviceGetAttribute(&raw mut pitch, 11, 0) }, 0);
    assert_eq!(pitch, i32::MAX);
    let pitch = pitch as usize;
    let from = Memory::new(2 * pitch + 2);
    let to = Memory::of(&[0; 6]);
    for row in 0..3 {
        from.write((row * pitch) as u64, &[row as u8 + 1, row as u8 + 11]);
    }
    assert_eq!(copy_rows(side(&from, 0, 0, pitch), side(&to, 0, 0, 2), 2, 3), 0);
    assert_eq!(to.read(0), [1, 11, 2, 12, 3, 13]);
}

#[test]
fn machine_code_is_for_another_device() {
    // The first bytes of a cubin: a 64-bit file of ABI version 7 for CUDA.
    let cubin = b"\x7fELF\x02\x01\x013\x07\0\0\0\0\0\0\0\x02\0\xbe\0";
    let ptx = c".version 8.0\n.target sm_80\n.address_size 64\n";
    let mut module = null_mut();
    // SAFETY: a file, or text that ends with a zero.
    unsafe {
        let load = |module, image| cuModuleLoadDataEx(module, image, 0, null_mut(), null_mut());
        assert_eq!(cuModuleLoadData(&raw mut module, cubin.as_ptr().cast()), NO_BINARY_FOR_GPU);
        assert_eq!(load(&raw mut module, cubin.as_ptr().cast()), NO_BINARY_FOR_GPU);
        assert!(module.is_null());
        assert_eq!(cuModuleLoadData(&raw mut module, ptx.as_ptr()), 0);
        assert_eq!(load(&raw mut module, ptx.as_ptr()), 0);
        assert!(!module.is_null());
        assert_eq!(cuModuleLoadData(&raw mut module, std::ptr::null()), INVALID_VALUE);
    }
}
