//! [`LaneAccesses`]: finds lanes of a warp that exchange data through memory without a barrier in between. In lockstep such
//! code always works; a device may run the lanes of a warp in any order.

use super::{Block, Warp};
use crate::instruction::Space;
use crate::memory::resolve;
use std::collections::HashMap;

/// Bytes that are tracked together. Accesses of single bytes are not tracked.
const GRANULE: u64 = 2;

/// How lanes use memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// Accesses to shared and global memory since the last barrier.
#[derive(Default)]
pub(super) struct LaneAccesses {
    /// How many barriers there were.
    epoch: u64,
    /// By offset.
    shared: Vec<GranuleAccesses>,
    /// By address, since the last barrier.
    global: HashMap<u64, GranuleAccesses>,
}

/// Masks of the lanes that accessed a granule in an epoch.
#[derive(Clone, Copy, Default)]
struct GranuleAccesses {
    epoch: u64,
    readers: u32,
    writers: u32,
}

impl GranuleAccesses {
    /// Adds an access; false if it conflicts with that of another lane.
    fn add(&mut self, epoch: u64, lanes: u32, access: Access) -> bool {
        if self.epoch != epoch {
            *self = Self { epoch, ..Self::default() };
        }
        if access == Access::Read {
            self.readers |= lanes;
        } else {
            self.writers |= lanes;
        }
        // A single writer may also be the reader.
        self.writers == 0 || (self.readers | self.writers).count_ones() == 1
    }
}

impl LaneAccesses {
    /// All accesses so far happen before those that follow.
    pub fn order(&mut self) {
        self.epoch += 1;
        self.global.clear();
    }

    fn granule(&mut self, space: Space, index: u64) -> &mut GranuleAccesses {
        if space == Space::Generic {
            return self.global.entry(index).or_default();
        }
        let index = index as usize;
        if index >= self.shared.len() {
            self.shared.resize(index + 1, GranuleAccesses::default());
        }
        &mut self.shared[index]
    }
}

impl Warp {
    /// Records an access by these lanes, in pedantic mode.
    ///
    /// # Errors
    /// Another lane accessed the same memory, one of them wrote it, and no barrier was in between.
    pub(super) fn record_access(
        &mut self,
        block: &Block,
        space: Space,
        lanes: u32,
        address: u64,
        bytes: u32,
        access: Access,
    ) -> Result<(), String> {
        let (space, offset) = resolve(space, address);
        if !block.schedule.pedantic || !matches!(space, Space::Shared | Space::Generic) || u64::from(bytes) < GRANULE {
            return Ok(());
        }
        let epoch = self.accesses.epoch;
        for index in offset / GRANULE..(offset + u64::from(bytes)).div_ceil(GRANULE) {
            let granule = self.accesses.granule(space, index);
            if !granule.add(epoch, lanes, access) {
                let GranuleAccesses { readers, writers, .. } = *granule;
                return Err(format!(
                    "lanes {writers:#x} write {:#x} of {space:?} memory and lanes {readers:#x} read it without a barrier",
                    index * GRANULE
                ));
            }
        }
        Ok(())
    }

    /// A barrier orders the accesses of all lanes, if none runs elsewhere.
    pub(super) fn order_accesses(&mut self, active: u32) {
        if active == self.running_lanes() {
            self.accesses.order();
        }
    }
}
