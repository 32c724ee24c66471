//! Asynchronous copies to shared memory: `cp.async` and bulk copies.

use super::hazards::Access;
use super::{Block, Warp, lanes_of};
use crate::instruction::{Instruction, Lanes, Space};
use crate::memory::{resolve, within};
use crate::tensor_map::{BulkCopy, TensorMap};
use std::array::from_fn;
use std::collections::VecDeque;
use std::ptr::{copy_nonoverlapping, write_bytes};

/// A lane's `cp.async`.
pub(super) struct AsyncCopy {
    lane: usize,
    to: u64,
    from: u64,
    bytes: u32,
    /// Bytes to read; the others become zeros.
    source_bytes: u32,
}

/// A warp's `cp.async` copies that have not landed.
#[derive(Default)]
pub(super) struct PendingCopies {
    /// Not yet in a group.
    open: Vec<AsyncCopy>,
    groups: VecDeque<Vec<AsyncCopy>>,
}

impl PendingCopies {
    /// `cp.async.commit_group`
    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }
}

impl Warp {
    /// `cp.async`
    pub(super) fn copy_async(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        bytes: u32,
    ) -> Result<(), String> {
        let operands = &instruction.from;
        let to = self.addresses(block, operands[0], operands[1]);
        let from = self.addresses(block, operands[2], operands[3]);
        let source_bytes = self.read(block, operands[4]);
        for lane in lanes_of(active) {
            if ![to[lane], from[lane]].iter().all(|address| address.is_multiple_of(u64::from(bytes))) {
                return Err(format!("lane {lane}: an address is not a multiple of {bytes}"));
            }
            let source_bytes = bytes.min(source_bytes[lane] as u32);
            let copy = AsyncCopy { lane, to: to[lane], from: from[lane], bytes, source_bytes };
            if block.schedule.early_copies {
                self.land(block, &copy)?;
            } else {
                self.copies.open.push(copy);
            }
        }
        Ok(())
    }

    /// `cp.async.wait_group`
    pub(super) fn wait_for_copies(&mut self, block: &mut Block, pending_groups: usize) -> Result<(), String> {
        while self.copies.groups.len() > pending_groups {
            for copy in self.copies.groups.pop_front().unwrap_or_default() {
                self.land(block, &copy)?;
            }
        }
        Ok(())
    }

    fn land(&mut self, block: &mut Block, copy: &AsyncCopy) -> Result<(), String> {
        let AsyncCopy { lane, to, from, bytes, source_bytes } = *copy;
        self.record_access(block, Space::Shared, 1 << lane, to, bytes, Access::Write)?;
        let memory = self.host_address(block, Space::Shared, lane, to, bytes)?;
        // SAFETY: `memory` has this many bytes, and so has the source if it is read at all.
        unsafe {
            write_bytes(memory, 0, bytes as usize);
            if source_bytes > 0 {
                let from = self.host_address(block, Space::Generic, lane, from, bytes)?;
                copy_nonoverlapping(from, memory, source_bytes as usize);
            }
        }
        Ok(())
    }

    /// `cp.async.bulk.tensor`, one copy for each active lane.
    pub(super) fn bulk_copy(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
    ) -> Result<(), String> {
        let operands = &instruction.from;
        let [to, maps, barriers] = [0, 2, 4].map(|at| self.addresses(block, operands[at], operands[at + 1]));
        let coordinates: Vec<Lanes> = operands[6..].iter().map(|operand| self.read(block, *operand)).collect();
        for lane in lanes_of(active) {
            let map = self.tensor_map(block, lane, maps[lane])?;
            if map.rank() != coordinates.len() {
                return Err(format!("lane {lane}: the tensor map has {} dimensions", map.rank()));
            }
            let copy = BulkCopy {
                map,
                from: from_fn(|axis| coordinates.get(axis).map_or(0, |values| i64::from(values[lane] as i32))),
                to: resolve(Space::Shared, to[lane]).1,
                barrier: block.mbarrier_offset(Space::Shared, lane, barriers[lane])?,
                text: instruction.text.clone(),
            };
            block.begin_bulk_copy(copy).map_err(|fault| format!("lane {lane}: {fault}"))?;
        }
        Ok(())
    }

    fn tensor_map(&mut self, block: &mut Block, lane: usize, address: u64) -> Result<TensorMap, String> {
        let memory =
            self.unaligned_host_address(block, Space::Generic, lane, address, size_of::<TensorMap>() as u32)?;
        // SAFETY: this many bytes are there, and any bytes are valid integers.
        let map = unsafe { memory.cast::<TensorMap>().read_unaligned() };
        if map.is_encoded() && address.is_multiple_of(64) {
            return Ok(map);
        }
        Err(format!("lane {lane}: there is no tensor map at {address:#x}, or it is not aligned to 64 bytes"))
    }
}

impl Block<'_> {
    /// Issues a bulk copy. Until it lands, its destination is NaN.
    fn begin_bulk_copy(&mut self, copy: BulkCopy) -> Result<(), String> {
        if !copy.to.is_multiple_of(copy.alignment()) {
            return Err(format!("{:#x} is not a multiple of {}", copy.to, copy.alignment()));
        }
        let destination = copy.destination();
        let size = self.shared.len();
        let range = within(size, copy.to, copy.bytes() as u64)
            .ok_or_else(|| format!("{destination:?} is outside of {size} bytes of shared memory"))?;
        if self.schedule.early_copies {
            copy.land(&mut self.shared, self.allocations)?;
            return self.barriers.update(copy.barrier, 0, -(copy.bytes() as i64)).map(drop);
        }
        self.barriers.begin_copy(copy)?;
        self.shared[range].fill(0xff);
        Ok(())
    }
}
