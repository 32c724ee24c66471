//! What instructions do to registers and memory.

use crate::barriers::{arrive, make, unmake};
use crate::instruction::{Instruction, Lanes, Operand, Operation, Space, WARP};
use crate::matrices::require_all;
use crate::memory::resolve;
use crate::warp::{Block, Copy, Warp, lanes_of};
use std::array::from_fn;
use std::ptr::{copy_nonoverlapping, write_bytes};

/// What an atomic operation leaves of a value and two operands.
type Change = fn(u64, u64, u64) -> u64;

impl Warp {
    /// An instruction that ends no group and puts none aside, for these lanes.
    pub(crate) fn execute(&mut self, block: &mut Block, at: usize, active: u32) -> Result<(), String> {
        let instruction = &block.program.instructions[at];
        match instruction.operation {
            Operation::Load(space, bytes, signed) => self.load(block, instruction, active, (space, bytes, signed)),
            Operation::Store(space, bytes) => self.store(block, instruction, active, (space, bytes)),
            Operation::Atomic(space, bytes, compute) => {
                self.atomic(block, instruction, active, (space, bytes, compute))
            }
            Operation::Shuffle(source) => self.shuffle(block, instruction, active, source),
            Operation::Elect => self.elect(block, instruction, active),
            Operation::CopyAsync(bytes) => self.copy_async(block, instruction, active, bytes),
            Operation::Commit => {
                self.under_way.push_back(std::mem::take(&mut self.open));
                Ok(())
            }
            Operation::Wait(groups) => self.await_copies(block, groups),
            Operation::LoadMatrices(count, transposed) => {
                self.load_matrices(block, instruction, active, count, transposed)
            }
            Operation::MultiplyAdd(number) => self.multiply_add(block, instruction, active, number),
            Operation::MakeBarrier(space) => self.on_barriers(block, instruction, active, space, make),
            Operation::DropBarrier(space) => self.on_barriers(block, instruction, active, space, unmake),
            Operation::Arrive(space) => self.on_barriers(block, instruction, active, space, arrive),
            Operation::CopyBox => self.copy_box(block, instruction, active),
            Operation::FenceProducts => require_all(active).map(|()| self.fence()),
            Operation::BeginProduct(product) => self.begin_product(block, at, active, &product),
            Operation::CommitProducts => require_all(active).map(|()| self.products.commit()),
            Operation::AwaitProducts(groups) => require_all(active).and_then(|()| self.await_products(block, groups)),
            Operation::Trap(problem) => Err(problem.to_owned()),
            _ => {
                self.compute(block, instruction, active);
                Ok(())
            }
        }
    }

    /// Lane by lane, from registers to registers.
    fn compute(&mut self, block: &Block, instruction: &Instruction, active: u32) {
        let Instruction { from, to, .. } = instruction;
        let value = match instruction.operation {
            Operation::One(compute) => compute(&self.read(block, from[0])),
            Operation::Two(compute) => compute(&self.read(block, from[0]), &self.read(block, from[1])),
            Operation::Three(compute) => {
                let [a, b, c] = from_fn(|i| self.read(block, from[i]));
                compute(&a, &b, &c)
            }
            Operation::Halves(compute) => {
                let operands: [Lanes; 3] = from_fn(|i| from.get(i).map_or([0; WARP], |one| self.read(block, *one)));
                let half = |shift: u32| operands.map(|one| one.map(|bits| bits >> shift & 0xffff));
                let ([a, b, c], [d, e, f]) = (half(0), half(16));
                let (low, high) = (compute(&a, &b, &c), compute(&d, &e, &f));
                from_fn(|lane| low[lane] | high[lane] << 16)
            }
            Operation::Compare(compare, join) => {
                let mut holds = compare(&self.read(block, from[0]), &self.read(block, from[1]));
                let mut opposite = holds.map(|one| 1 - one);
                if let (Some(join), Some(with)) = (join, from.get(2)) {
                    let with = self.read(block, *with);
                    (holds, opposite) = (join(&holds, &with), join(&opposite, &with));
                }
                if let Some(second) = to.get(1) {
                    self.write(*second, active, opposite);
                }
                holds
            }
            Operation::Set(compare, value) => {
                compare(&self.read(block, from[0]), &self.read(block, from[1])).map(|one| one * value)
            }
            Operation::Convert(convert) => self.read(block, from[0]).map(|bits| convert.apply(bits)),
            Operation::Pack(bits) => self.pack(block, from, bits),
            Operation::Unpack(bits) => return self.unpack(block, instruction, active, bits),
            Operation::Insert(width) => {
                let [a, b, at, length] = from_fn(|i| self.read(block, from[i]));
                from_fn(|i| crate::arithmetic::insert_bits(a[i], b[i], at[i], length[i], width))
            }
            _ => return,
        };
        self.write(to[0], active, value);
    }

    fn pack(&self, block: &Block, parts: &[Operand], bits: u32) -> Lanes {
        let mut value = [0; WARP];
        for (at, part) in parts.iter().enumerate() {
            let part = self.read(block, *part);
            value = from_fn(|i| value[i] | (part[i] & ones(bits)) << (at as u32 * bits));
        }
        value
    }

    fn unpack(&mut self, block: &Block, instruction: &Instruction, active: u32, bits: u32) {
        let value = self.read(block, instruction.from[0]);
        for (at, register) in instruction.to.iter().enumerate() {
            self.write(*register, active, value.map(|one| one >> (at as u32 * bits) & ones(bits)));
        }
    }

    /// Where a lane's address lies on the host, if it may be written.
    fn target(
        &mut self,
        block: &mut Block,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<*mut u8, String> {
        if resolve(space, address).0 == Space::Parameter {
            return Err(format!("lane {lane}: arguments are only read"));
        }
        self.memory(block, space, lane, address, bytes)
    }

    fn load(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        (space, bytes, signed): (Space, u32, bool),
    ) -> Result<(), String> {
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        let all = bytes * instruction.to.len() as u32;
        let unused = 64 - 8 * bytes;
        for lane in lanes_of(active) {
            let memory = self.memory(block, space, lane, addresses[lane], all)?;
            for (at, register) in instruction.to.iter().enumerate() {
                // SAFETY: `memory` has `all` bytes.
                let value = unsafe { read_bytes(memory.add(at * bytes as usize), bytes) };
                let value = if signed { ((value << unused).cast_signed() >> unused).cast_unsigned() } else { value };
                self.set(*register, lane, value);
            }
        }
        Ok(())
    }

    fn store(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        (space, bytes): (Space, u32),
    ) -> Result<(), String> {
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        let values = &instruction.from[2..];
        for lane in lanes_of(active) {
            let memory = self.target(block, space, lane, addresses[lane], bytes * values.len() as u32)?;
            for (at, value) in values.iter().enumerate() {
                let value = self.read_lane(block, *value, lane);
                let to = memory.wrapping_add(at * bytes as usize);
                // SAFETY: `memory` has room for all values. Blocks that write the same bytes race, as on the device.
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
        (space, bytes, compute): (Space, u32, Change),
    ) -> Result<(), String> {
        let from = &instruction.from;
        let addresses = self.addresses(block, from[0], from[1]);
        let operands = [2, 3].map(|at| from.get(at).map_or([0; WARP], |one| self.read(block, *one)));
        let _alone = block.atomics.lock();
        for lane in lanes_of(active) {
            let memory = self.target(block, space, lane, addresses[lane], bytes)?;
            // SAFETY: `memory` is as large.
            let old = unsafe { read_bytes(memory, bytes) };
            let new = compute(old, operands[0][lane], operands[1][lane]);
            // SAFETY: the same.
            unsafe { copy_nonoverlapping(new.to_le_bytes().as_ptr(), memory, bytes as usize) };
            self.set(instruction.to[0], lane, old);
        }
        Ok(())
    }

    fn shuffle(
        &mut self,
        block: &Block,
        instruction: &Instruction,
        active: u32,
        source: fn(u32, u32, u32) -> u32,
    ) -> Result<(), String> {
        let [value, b, clamp] = from_fn(|i| self.read(block, instruction.from[i]));
        let mut out = [0; WARP];
        for lane in lanes_of(active) {
            let source = source(lane as u32, b[lane] as u32, clamp[lane] as u32);
            if active >> source & 1 == 0 {
                return Err(format!("lane {lane} takes the value of lane {source}, which is not here"));
            }
            out[lane] = value[source as usize];
        }
        self.write(instruction.to[0], active, out);
        Ok(())
    }

    fn elect(&mut self, block: &Block, instruction: &Instruction, active: u32) -> Result<(), String> {
        let named = self.read(block, instruction.from[0]);
        if let Some(lane) = lanes_of(active).find(|lane| named[*lane] as u32 >> lane & 1 == 0) {
            return Err(format!("lane {lane} is not among those it names"));
        }
        let elected = active.trailing_zeros() as usize;
        self.write(instruction.to[0], active, [elected as u64; WARP]);
        self.write(instruction.to[1], active, from_fn(|lane| u64::from(lane == elected)));
        Ok(())
    }

    fn copy_async(&mut self, block: &Block, instruction: &Instruction, active: u32, bytes: u32) -> Result<(), String> {
        let from = &instruction.from;
        let [to, source] = [self.addresses(block, from[0], from[1]), self.addresses(block, from[2], from[3])];
        let valid = self.read(block, from[4]);
        for lane in lanes_of(active) {
            let (to, from, valid) = (to[lane], source[lane], valid[lane] as u32);
            if to % u64::from(bytes) != 0 || from % u64::from(bytes) != 0 {
                return Err(format!("lane {lane}: an address is no multiple of {bytes}"));
            }
            self.open.push(Copy { to, from, bytes, valid: valid.min(bytes) });
        }
        Ok(())
    }

    fn await_copies(&mut self, block: &mut Block, groups: usize) -> Result<(), String> {
        while self.under_way.len() > groups {
            for copy in self.under_way.pop_front().unwrap_or_default() {
                self.land(block, &copy)?;
            }
        }
        Ok(())
    }

    fn land(&mut self, block: &mut Block, copy: &Copy) -> Result<(), String> {
        let to = self.memory(block, Space::Shared, 0, copy.to, copy.bytes)?;
        let valid = copy.valid as usize;
        // SAFETY: `to` has as many bytes; so has the source, where it is read.
        unsafe {
            write_bytes(to, 0, copy.bytes as usize);
            if valid > 0 {
                copy_nonoverlapping(self.memory(block, Space::Generic, 0, copy.from, copy.bytes)?, to, valid);
            }
        }
        Ok(())
    }
}

fn ones(bits: u32) -> u64 {
    if bits == 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// # Safety
/// So many bytes, at most 8, can be read there.
unsafe fn read_bytes(memory: *const u8, bytes: u32) -> u64 {
    let mut value = [0; 8];
    // SAFETY: the caller's promise.
    unsafe { copy_nonoverlapping(memory, value.as_mut_ptr(), bytes as usize) };
    u64::from_le_bytes(value)
}
