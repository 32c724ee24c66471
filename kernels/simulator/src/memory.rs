//! Device memory. An access must lie within a single allocation.

use crate::instruction::Space;
use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Where shared memory begins in the generic address space.
pub const SHARED: u64 = 1 << 56;
/// Where local memory begins in the generic address space.
pub const LOCAL: u64 = 2 << 56;
/// Where kernel arguments begin in the generic address space.
pub const PARAMETER: u64 = 3 << 56;

/// Allocations of this many bytes or more are zero instead of NaN, so that they take no more of the machine's memory
/// than is used of them.
pub const LAZY_BYTES: usize = 256 << 20;

/// An allocation, found by its address in [`Allocations`].
pub struct Allocation {
    /// Its size.
    bytes: usize,
    /// Begin and layout of the block of the system allocator that holds it.
    block: u64,
    layout: Layout,
}

/// All allocations, by address.
pub type Allocations = BTreeMap<u64, Allocation>;

static ALLOCATIONS: RwLock<Allocations> = RwLock::new(BTreeMap::new());

const ALIGN: usize = 256;
/// What every system allocator aligns to. Memory that is zero and aligned to more would be filled, not mapped.
const SYSTEM_ALIGN: usize = 16;

/// Allocates memory, filled with NaN of every format, or with zeros from [`LAZY_BYTES`] on; 0 if there is not enough.
pub fn allocate(bytes: usize) -> u64 {
    let Some(allocation) = (if bytes < LAZY_BYTES { filled(bytes) } else { lazy(bytes) }) else { return 0 };
    let address = allocation.block.next_multiple_of(ALIGN as u64);
    allocations_mut().insert(address, allocation);
    address
}

fn filled(bytes: usize) -> Option<Allocation> {
    let layout = Layout::from_size_align(bytes.max(1), ALIGN).ok()?;
    // SAFETY: the layout is not empty.
    let block = unsafe { alloc(layout) };
    if block.is_null() {
        return None;
    }
    // SAFETY: just allocated, of that size.
    unsafe { block.write_bytes(0xff, bytes) };
    Some(Allocation { bytes, block: block as u64, layout })
}

/// Allocates zeros, which the system maps when they are first written, and some more, to align them.
fn lazy(bytes: usize) -> Option<Allocation> {
    let layout = Layout::from_size_align(bytes.checked_add(ALIGN)?, SYSTEM_ALIGN).ok()?;
    // SAFETY: the layout is not empty.
    let block = unsafe { alloc_zeroed(layout) };
    (!block.is_null()).then_some(Allocation { bytes, block: block as u64, layout })
}

/// Frees memory; false if there is no such allocation.
pub fn free(address: u64) -> bool {
    let Some(allocation) = allocations_mut().remove(&address) else { return false };
    // SAFETY: allocated with this layout, and freed once: it was still in the table.
    unsafe { dealloc(allocation.block as *mut u8, allocation.layout) };
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
    let (begin, allocation) = allocations.range(..=address).next_back()?;
    let end = begin + allocation.bytes as u64;
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
