//! What a warp does at barriers.

use super::hazards::Access;
use super::{Block, LaneGroup, Warp, lanes_of, lanes_where, uniform_value};
use crate::barriers::{Arrival, Barriers};
use crate::instruction::{Instruction, Lanes, Space, WARP_SIZE};
use crate::memory::{resolve, within};

/// Groups of lanes that poll an mbarrier whose phase has not completed. A group may fail twice before it is suspended until
/// the next event, since the first attempt may be a `test_wait` outside of a loop.
#[derive(Default)]
pub(super) struct FailedPolls {
    /// Count of events to which the groups refer.
    events: u64,
    once: Vec<LaneGroup>,
    suspended: Vec<LaneGroup>,
}

impl FailedPolls {
    /// Notes a failed poll; whether the group is now suspended.
    fn add(&mut self, events: u64, group: LaneGroup) -> bool {
        if self.events != events {
            *self = Self { events, ..Self::default() };
        }
        let again = self.once.contains(&group);
        if again { &mut self.suspended } else { &mut self.once }.push(group);
        again
    }

    /// Whether a group waits for the next event.
    pub fn is_suspended(&self, events: u64, group: LaneGroup) -> bool {
        self.events == events && self.suspended.contains(&group)
    }
}

impl Block<'_> {
    /// Offset of an mbarrier in shared memory.
    pub(super) fn mbarrier_offset(&self, space: Space, lane: usize, address: u64) -> Result<u64, String> {
        let (space, at) = resolve(space, address);
        if space != Space::Shared || at % 8 != 0 || within(self.shared.len(), at, 8).is_none() {
            let bytes = self.shared.len();
            return Err(format!(
                "lane {lane}: {at:#x} is not an aligned 8-byte word in {bytes} bytes of shared memory"
            ));
        }
        Ok(at)
    }

    /// Whether a phase has completed, once the copies have landed that can complete it.
    fn poll_phase(&mut self, at: u64, parity: u64) -> Result<bool, String> {
        loop {
            if self.barriers.is_phase_complete(at, parity)? {
                return Ok(true);
            }
            let Some(copy) = self.barriers.take_due_copy(at)? else { return Ok(false) };
            copy.land(&mut self.shared, self.allocations).map_err(|fault| format!("`{}`: {fault}", copy.text))?;
            self.barriers.update(at, 0, -(copy.bytes() as i64))?;
        }
    }
}

impl Warp {
    /// `bar.sync` and `bar.arrive`
    pub(super) fn arrive_at_thread_barrier(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        lanes: u32,
        active: u32,
    ) -> Result<Arrival, String> {
        if lanes != active {
            return Err("lanes diverge at a barrier".to_owned());
        }
        let mut operands = Vec::new();
        for operand in &instruction.from {
            operands.push(uniform_value(&self.read(block, *operand), active)?);
        }
        let wanted = operands.get(1).copied();
        if block.schedule.pedantic && wanted.is_none() && lanes != self.lanes {
            return Err(format!("lanes {:#x} exited without reaching a barrier of all threads", self.lanes & !lanes));
        }
        self.order_accesses(active);
        block.barriers.arrive_at_thread_barrier(operands[0], wanted)
    }

    /// Applies `update` to the mbarrier at each lane's address, with the lane's operands.
    pub(super) fn update_mbarriers(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        space: Space,
        update: fn(&mut Barriers, u64, &[u64]) -> Result<u64, String>,
    ) -> Result<(), String> {
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        let operands: Vec<Lanes> = instruction.from[2..].iter().map(|operand| self.read(block, *operand)).collect();
        let mut results = [0; WARP_SIZE];
        for lane in lanes_of(active) {
            let at = block.mbarrier_offset(space, lane, addresses[lane])?;
            let operands: Vec<u64> = operands.iter().map(|operand| u64::from(operand[lane] as u32)).collect();
            results[lane] =
                update(&mut block.barriers, at, &operands).map_err(|fault| format!("lane {lane}: {fault}"))?;
        }
        if let Some(to) = instruction.to.first() {
            self.write(*to, active, results);
        }
        Ok(())
    }

    /// `mbarrier.try_wait` and `test_wait`; false if the group is suspended and has to execute it again.
    pub(super) fn test_barriers(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        group: LaneGroup,
        active: u32,
        space: Space,
    ) -> Result<bool, String> {
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        let parity = self.read(block, instruction.from[2]);
        let mut complete = [0; WARP_SIZE];
        for lane in lanes_of(active) {
            if parity[lane] as u32 > 1 {
                return Err(format!("lane {lane}: {} is not a parity", parity[lane] as u32));
            }
            let at = block.mbarrier_offset(space, lane, addresses[lane])?;
            complete[lane] = u64::from(block.poll_phase(at, parity[lane] & 1)?);
        }
        let completed = lanes_where(|lane| complete[lane] == 1);
        if completed == 0 && self.polls.add(block.barriers.events, group) {
            return Ok(false);
        }
        self.order_accesses(completed);
        self.write(instruction.to[0], active, complete);
        Ok(true)
    }

    /// `bar.warp.sync`
    pub(super) fn synchronize_lanes(&mut self, active: u32) {
        self.order_accesses(active);
    }

    /// `ldmatrix` reads a row for all lanes.
    pub(super) fn record_shared_read(&mut self, block: &Block, address: u64, bytes: u32) -> Result<(), String> {
        self.record_access(block, Space::Shared, u32::MAX, address, bytes, Access::Read)
    }
}

/// `mbarrier.init`
pub(super) fn init(barriers: &mut Barriers, at: u64, operands: &[u64]) -> Result<u64, String> {
    barriers.init(at, operands[0]).map(|()| 0)
}

/// `mbarrier.inval`
pub(super) fn invalidate(barriers: &mut Barriers, at: u64, _: &[u64]) -> Result<u64, String> {
    barriers.invalidate(at).map(|()| 0)
}

/// `mbarrier.arrive` and `mbarrier.expect_tx`; the result is the phase.
pub(super) fn arrive(barriers: &mut Barriers, at: u64, operands: &[u64]) -> Result<u64, String> {
    barriers.update(at, operands[0], operands[1] as i64)
}
