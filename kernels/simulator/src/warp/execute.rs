//! What instructions do to registers and memory.

use super::hazards::Access;
use super::sync::{arrive, init, invalidate};
use super::{Block, Warp, lanes_of, require_all_lanes};
use crate::arithmetic::insert_bits;
use crate::instruction::{AtomicFn, BinaryFn, Instruction, Lanes, Operand, Operation, Space, TernaryFn, WARP_SIZE};
use crate::memory::resolve;
use std::array::from_fn;
use std::ptr::copy_nonoverlapping;

impl Warp {
    /// Executes an instruction that neither ends lanes nor makes them wait.
    pub(super) fn execute(&mut self, block: &mut Block, at: usize, active: u32) -> Result<(), String> {
        let instruction = &block.program.instructions[at];
        match instruction.operation {
            Operation::Load { space, bytes, signed } => self.load(block, instruction, active, space, bytes, signed)?,
            Operation::Store { space, bytes } => self.store(block, instruction, active, space, bytes)?,
            Operation::Atomic { space, bytes, update } => {
                self.atomic(block, instruction, active, space, bytes, update)?;
            }
            Operation::WarpSync => self.synchronize_lanes(active),
            Operation::Shuffle(source) => self.shuffle(block, instruction, active, source)?,
            Operation::Elect => self.elect(block, instruction, active)?,
            Operation::CopyAsync(bytes) => self.copy_async(block, instruction, active, bytes)?,
            Operation::CopyCommit => self.copies.commit(),
            Operation::CopyWait(groups) => self.wait_for_copies(block, groups)?,
            Operation::CopyWaitAll => {
                self.copies.commit();
                self.wait_for_copies(block, 0)?;
            }
            Operation::BulkCopy => self.bulk_copy(block, instruction, active)?,
            Operation::LoadMatrices { count, transposed } => {
                self.load_matrices(block, instruction, active, count, transposed)?;
            }
            Operation::Mma(element) => self.multiply_add(block, instruction, active, element)?,
            Operation::InitBarrier(space) => self.update_mbarriers(block, instruction, active, space, init)?,
            Operation::InvalidateBarrier(space) => {
                self.update_mbarriers(block, instruction, active, space, invalidate)?;
            }
            Operation::ArriveBarrier(space) => self.update_mbarriers(block, instruction, active, space, arrive)?,
            Operation::WgmmaFence => require_all_lanes(active).map(|()| self.fence())?,
            Operation::Wgmma(shape) => self.begin_wgmma(block, at, active, &shape)?,
            Operation::WgmmaCommit => require_all_lanes(active).map(|()| self.wgmma.commit())?,
            Operation::WgmmaWait(groups) => {
                require_all_lanes(active)?;
                self.wait_for_wgmma(block, groups)?;
            }
            Operation::Trap(message) => return Err(message.to_owned()),
            _ => self.compute(block, instruction, active),
        }
        Ok(())
    }

    /// Lane-wise instructions on registers.
    fn compute(&mut self, block: &Block, instruction: &Instruction, active: u32) {
        let from = &instruction.from;
        let operand = |at: usize| self.read(block, from[at]);
        let value = match instruction.operation {
            Operation::Unary(compute) => compute(&operand(0)),
            Operation::Binary(compute) => compute(&operand(0), &operand(1)),
            Operation::Ternary(compute) => compute(&operand(0), &operand(1), &operand(2)),
            Operation::PerHalf(compute) => {
                per_half(compute, &from_fn(|at| if at < from.len() { operand(at) } else { [0; WARP_SIZE] }))
            }
            Operation::Compare(compare, join) => return self.compare(block, instruction, active, compare, join),
            Operation::Set(compare, value) => compare(&operand(0), &operand(1)).map(|holds| holds * value),
            Operation::Convert(convert) => operand(0).map(|bits| convert.apply(bits)),
            Operation::Pack(bits) => self.pack(block, from, bits),
            Operation::Unpack(bits) => return self.unpack(block, instruction, active, bits),
            Operation::BitInsert(width) => {
                let [a, b, at, length] = from_fn(operand);
                from_fn(|i| insert_bits(a[i], b[i], at[i], length[i], width))
            }
            _ => return,
        };
        self.write(instruction.to[0], active, value);
    }

    /// `setp`
    fn compare(
        &mut self,
        block: &Block,
        instruction: &Instruction,
        active: u32,
        compare: BinaryFn,
        join: Option<BinaryFn>,
    ) {
        let from = &instruction.from;
        let mut holds = compare(&self.read(block, from[0]), &self.read(block, from[1]));
        let mut negation = holds.map(|value| 1 - value);
        if let (Some(join), Some(with)) = (join, from.get(2)) {
            let with = self.read(block, *with);
            holds = join(&holds, &with);
            negation = join(&negation, &with);
        }
        if let Some(second) = instruction.to.get(1) {
            self.write(*second, active, negation);
        }
        self.write(instruction.to[0], active, holds);
    }

    fn pack(&self, block: &Block, parts: &[Operand], bits: u32) -> Lanes {
        let mut value = [0; WARP_SIZE];
        for (at, part) in parts.iter().enumerate() {
            let part = self.read(block, *part);
            value = from_fn(|i| value[i] | (part[i] & low_bits(bits)) << (at as u32 * bits));
        }
        value
    }

    fn unpack(&mut self, block: &Block, instruction: &Instruction, active: u32, bits: u32) {
        let value = self.read(block, instruction.from[0]);
        for (at, register) in instruction.to.iter().enumerate() {
            self.write(*register, active, value.map(|all| all >> (at as u32 * bits) & low_bits(bits)));
        }
    }

    /// The host address of an access that writes.
    fn writable_address(
        &mut self,
        block: &mut Block,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<*mut u8, String> {
        if resolve(space, address).0 == Space::Parameter {
            return Err(format!("lane {lane}: kernel arguments are read-only"));
        }
        self.host_address(block, space, lane, address, bytes)
    }

    fn load(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        space: Space,
        bytes: u32,
        signed: bool,
    ) -> Result<(), String> {
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        let total = bytes * instruction.to.len() as u32;
        let unused = 64 - 8 * bytes;
        for lane in lanes_of(active) {
            let memory = self.host_address(block, space, lane, addresses[lane], total)?;
            self.record_access(block, space, 1 << lane, addresses[lane], total, Access::Read)?;
            for (at, register) in instruction.to.iter().enumerate() {
                // SAFETY: `memory` has `total` bytes.
                let value = unsafe { read_bytes(memory.add(at * bytes as usize), bytes) };
                let value = if signed { ((value << unused).cast_signed() >> unused).cast_unsigned() } else { value };
                self.write_lane(*register, lane, value);
            }
        }
        Ok(())
    }

    fn store(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        space: Space,
        bytes: u32,
    ) -> Result<(), String> {
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        let values = &instruction.from[2..];
        let total = bytes * values.len() as u32;
        for lane in lanes_of(active) {
            let memory = self.writable_address(block, space, lane, addresses[lane], total)?;
            self.record_access(block, space, 1 << lane, addresses[lane], total, Access::Write)?;
            for (at, value) in values.iter().enumerate() {
                let value = self.read_lane(block, *value, lane);
                let to = memory.wrapping_add(at * bytes as usize);
                // SAFETY: `memory` has `total` bytes. Blocks that write the same bytes race, as on the device.
                unsafe { copy_nonoverlapping(value.to_le_bytes().as_ptr(), to, bytes as usize) };
            }
        }
        Ok(())
    }

    fn atomic(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        space: Space,
        bytes: u32,
        update: AtomicFn,
    ) -> Result<(), String> {
        let from = &instruction.from;
        let addresses = self.addresses(block, from[0], from[1]);
        let operands = [2, 3].map(|at| from.get(at).map_or([0; WARP_SIZE], |operand| self.read(block, *operand)));
        let _guard = block.atomics.lock();
        for lane in lanes_of(active) {
            let memory = self.writable_address(block, space, lane, addresses[lane], bytes)?;
            // SAFETY: `memory` has `bytes` bytes.
            let old = unsafe { read_bytes(memory, bytes) };
            let new = update(old, operands[0][lane], operands[1][lane]);
            // SAFETY: the same.
            unsafe { copy_nonoverlapping(new.to_le_bytes().as_ptr(), memory, bytes as usize) };
            self.write_lane(instruction.to[0], lane, old);
        }
        Ok(())
    }

    /// `shfl.sync`
    fn shuffle(
        &mut self,
        block: &Block,
        instruction: &Instruction,
        active: u32,
        source: fn(u32, u32, u32) -> u32,
    ) -> Result<(), String> {
        let [value, b, clamp, mask] = from_fn(|i| self.read(block, instruction.from[i]));
        let mut out = [0; WARP_SIZE];
        for lane in lanes_of(active) {
            let source = source(lane as u32, b[lane] as u32, clamp[lane] as u32);
            if active >> source & 1 == 0 {
                return Err(format!("lane {lane} reads the value of lane {source}, which is not active"));
            }
            let exited = mask[lane] as u32 & self.lanes & !active;
            if block.schedule.pedantic && exited != 0 {
                return Err(format!("lane {lane} shuffles with lanes {exited:#x}, which do not take part"));
            }
            out[lane] = value[source as usize];
        }
        self.write(instruction.to[0], active, out);
        Ok(())
    }

    /// `elect.sync`
    fn elect(&mut self, block: &Block, instruction: &Instruction, active: u32) -> Result<(), String> {
        let mask = self.read(block, instruction.from[0]);
        if let Some(lane) = lanes_of(active).find(|lane| mask[*lane] as u32 >> lane & 1 == 0) {
            return Err(format!("lane {lane} is not in its own mask"));
        }
        let elected = active.trailing_zeros() as usize;
        self.write(instruction.to[0], active, [elected as u64; WARP_SIZE]);
        self.write(instruction.to[1], active, from_fn(|lane| u64::from(lane == elected)));
        Ok(())
    }
}

/// Applies a function to the low and the high 16 bits of each lane.
fn per_half(compute: TernaryFn, operands: &[Lanes; 3]) -> Lanes {
    let half = |shift: u32| operands.map(|operand| operand.map(|bits| bits >> shift & 0xffff));
    let [a, b, c] = half(0);
    let low = compute(&a, &b, &c);
    let [a, b, c] = half(16);
    let high = compute(&a, &b, &c);
    from_fn(|lane| low[lane] | high[lane] << 16)
}

fn low_bits(count: u32) -> u64 {
    if count == 64 { u64::MAX } else { (1 << count) - 1 }
}

/// # Safety
/// This many bytes, at most 8, must be readable.
unsafe fn read_bytes(memory: *const u8, bytes: u32) -> u64 {
    let mut value = [0; 8];
    // SAFETY: the caller's promise.
    unsafe { copy_nonoverlapping(memory, value.as_mut_ptr(), bytes as usize) };
    u64::from_le_bytes(value)
}
