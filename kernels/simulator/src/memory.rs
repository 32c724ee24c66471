//! Device memory. An access must lie within a single allocation.

use crate::instruction::Space;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Where shared memory begins in the generic address space.
pub const SHARED: u64 = 1 << 56;
/// Where local memory begins in the generic address space.
pub const LOCAL: u64 = 2 << 56;
/// Where kernel arguments begin in the generic address space.
pub const PARAMETER: u64 = 3 << 56;

/// Size of each allocation, by address.
pub type Allocations = BTreeMap<u64, usize>;

static ALLOCATIONS: RwLock<Allocations> = RwLock::new(BTreeMap::new());

const ALIGN: usize = 256;

/// Allocates memory, filled with NaN of every format; 0 if there is not enough.
pub fn allocate(bytes: usize) -> u64 {
    let Ok(layout) = Layout::from_size_align(bytes.max(1), ALIGN) else { return 0 };
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc(layout) };
    if !memory.is_null() {
        // SAFETY: just allocated, of that size.
        unsafe { memory.write_bytes(0xff, bytes) };
        allocations_mut().insert(memory as u64, bytes);
    }
    memory as u64
}

/// Frees memory; false if there is no such allocation.
pub fn free(address: u64) -> bool {
    let Some(bytes) = allocations_mut().remove(&address) else { return false };
    let Ok(layout) = Layout::from_size_align(bytes.max(1), ALIGN) else { return false };
    // SAFETY: allocated by `allocate` with this layout, and freed once: it was still in the table.
    unsafe { dealloc(address as *mut u8, layout) };
    true
}

/// The current allocations, locked for reading.
pub fn allocations() -> RwLockReadGuard<'static, Allocations> {
    ALLOCATIONS.read().unwrap_or_else(PoisonError::into_inner)
}

/// Whether these bytes all lie within one allocation.
pub fn holds(address: u64, bytes: usize) -> bool {
    bytes == 0 || find(&allocations(), address, bytes as u64).is_some()
}

/// Begin and end of the allocation that contains all these bytes.
pub fn find(allocations: &Allocations, address: u64, bytes: u64) -> Option<(u64, u64)> {
    let (begin, size) = allocations.range(..=address).next_back()?;
    let end = begin + *size as u64;
    (address.checked_add(bytes)? <= end).then_some((*begin, end))
}

/// Resolves a generic address to its state space and the offset in it.
pub fn resolve(space: Space, address: u64) -> (Space, u64) {
    match space {
        Space::Generic if address >= PARAMETER => (Space::Parameter, address - PARAMETER),
        Space::Generic if address >= LOCAL => (Space::Local, address - LOCAL),
        Space::Generic if address >= SHARED => (Space::Shared, address - SHARED),
        Space::Shared | Space::Local => (space, address & 0xffff_ffff),
        _ => (space, address),
    }
}

/// The byte range of an access to a window of this size, if it lies within.
pub fn within(window: usize, offset: u64, bytes: u64) -> Option<std::ops::Range<usize>> {
    let end = offset.checked_add(bytes)?;
    (end <= window as u64).then_some(offset as usize..end as usize)
}

fn allocations_mut() -> RwLockWriteGuard<'static, Allocations> {
    ALLOCATIONS.write().unwrap_or_else(PoisonError::into_inner)
}
