//! Memory of the device: what was allocated, and nothing beside it.

use crate::instruction::Space;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Generic addresses of a block's shared memory begin here.
pub const SHARED: u64 = 1 << 56;
/// And those of a thread's own.
pub const LOCAL: u64 = 2 << 56;
/// And those of a launch's arguments.
pub const PARAMETER: u64 = 3 << 56;

/// What is allocated, by address.
pub type Allocations = BTreeMap<u64, usize>;

static ALLOCATIONS: RwLock<Allocations> = RwLock::new(BTreeMap::new());

const ALIGN: usize = 256;

/// Takes memory, which begins as no numbers, in every format; 0 if there is none.
pub fn allocate(bytes: usize) -> u64 {
    let Ok(layout) = Layout::from_size_align(bytes.max(1), ALIGN) else { return 0 };
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc(layout) };
    if !memory.is_null() {
        // SAFETY: just allocated, of that size.
        unsafe { memory.write_bytes(0xff, bytes) };
        writing().insert(memory as u64, bytes);
    }
    memory as u64
}

/// Gives memory back; says whether it was taken.
pub fn free(address: u64) -> bool {
    let Some(bytes) = writing().remove(&address) else { return false };
    let Ok(layout) = Layout::from_size_align(bytes.max(1), ALIGN) else { return false };
    // SAFETY: allocated by `allocate` with this layout, and freed once: it stood in the table.
    unsafe { dealloc(address as *mut u8, layout) };
    true
}

/// What is allocated now.
pub fn allocations() -> RwLockReadGuard<'static, Allocations> {
    ALLOCATIONS.read().unwrap_or_else(PoisonError::into_inner)
}

/// Whether all these bytes are allocated, and as one.
pub fn holds(address: u64, bytes: usize) -> bool {
    bytes == 0 || find(&allocations(), address, bytes as u64).is_some()
}

/// The allocation with all of these bytes: where it begins and ends.
pub fn find(allocations: &Allocations, address: u64, bytes: u64) -> Option<(u64, u64)> {
    let (begin, size) = allocations.range(..=address).next_back()?;
    let end = begin + *size as u64;
    (address.checked_add(bytes)? <= end).then_some((*begin, end))
}

/// The space of an address, and where in it.
pub fn resolve(space: Space, address: u64) -> (Space, u64) {
    match space {
        Space::Generic if address >= PARAMETER => (Space::Parameter, address - PARAMETER),
        Space::Generic if address >= LOCAL => (Space::Local, address - LOCAL),
        Space::Generic if address >= SHARED => (Space::Shared, address - SHARED),
        Space::Shared | Space::Local => (space, address & 0xffff_ffff),
        _ => (space, address),
    }
}

/// Which bytes of a window these are, if it has them all.
pub fn within(window: usize, offset: u64, bytes: u64) -> Option<std::ops::Range<usize>> {
    let end = offset.checked_add(bytes)?;
    (end <= window as u64).then_some(offset as usize..end as usize)
}

fn writing() -> RwLockWriteGuard<'static, Allocations> {
    ALLOCATIONS.write().unwrap_or_else(PoisonError::into_inner)
}
