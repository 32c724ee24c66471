//! [`Warp`]: 32 threads in step. Lanes that part go on in turn, those furthest behind first, until they meet again;
//! where a warp works together, they wait for each other.

use crate::instruction::{Instruction, Lanes, Operand, Operation, Space, Special, WARP};
use crate::memory::{Allocations, LOCAL, SHARED, find};
use crate::program::Program;
use std::array::from_fn;
use std::collections::VecDeque;
use std::ptr::{copy_nonoverlapping, write_bytes};
use std::sync::Mutex;

/// What the warps of a block share.
pub struct Block<'a> {
    /// What runs.
    pub program: &'a Program,
    /// The arguments of the launch.
    pub parameters: &'a [u8],
    /// Memory of the device.
    pub allocations: &'a Allocations,
    /// One atomic operation at a time.
    pub atomics: &'a Mutex<()>,
    /// Shared memory.
    pub shared: Vec<u8>,
    /// Threads of a block, blocks of the grid, and where this one stands in it.
    pub threads: [u32; 3],
    /// See `threads`.
    pub blocks: [u32; 3],
    /// See `threads`.
    pub index: [u32; 3],
}

/// A warp that runs.
pub struct Warp {
    number: usize,
    registers: Vec<Lanes>,
    /// Where lanes are that run, each group at another instruction.
    groups: Vec<(usize, u32)>,
    local: Vec<u8>,
    /// Copies to shared memory that no group has yet, and the groups under way.
    open: Vec<Copy>,
    under_way: VecDeque<Vec<Copy>>,
    /// The allocation of the last access.
    last: (u64, u64),
}

struct Copy {
    to: u64,
    from: u64,
    bytes: u32,
    /// Those taken from there; the others become zeros.
    valid: u32,
}

/// Why a warp stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It waits for the block.
    Barrier,
    /// All lanes have ended.
    End,
}

impl Warp {
    /// A warp of this number in its block, at the beginning of a program.
    pub fn new(program: &Program, number: usize) -> Self {
        Self {
            number,
            registers: vec![[0; WARP]; program.registers],
            groups: Vec::new(),
            local: vec![0; program.local_bytes * WARP],
            open: Vec::new(),
            under_way: VecDeque::new(),
            last: (1, 0),
        }
    }

    /// Begins anew in a block; what it remembers are no numbers.
    pub fn begin(&mut self, block: &Block) {
        let threads = block.threads.iter().product::<u32>() as usize - self.number * WARP;
        self.groups.push((0, if threads >= WARP { u32::MAX } else { (1 << threads) - 1 }));
        self.registers.fill([u64::MAX; WARP]);
        self.local.fill(0xff);
        self.open.clear();
        self.under_way.clear();
    }

    /// Whether all lanes have ended.
    pub fn ended(&self) -> bool {
        self.groups.is_empty()
    }

    /// Runs until the warp waits or ends.
    ///
    /// # Errors
    /// What a GPU would do wrong, with instruction and lane.
    pub fn run(&mut self, block: &mut Block) -> Result<Stop, String> {
        let program = block.program;
        while !self.groups.is_empty() {
            let ready = (0..self.groups.len()).filter(|at| self.groups.len() == 1 || self.is_ready(block, *at));
            let next = ready.min_by_key(|at| self.groups[*at].0);
            let Some(behind) = next else {
                let waits = self
                    .groups
                    .iter()
                    .map(|(at, lanes)| format!("lanes {lanes:#x} at `{}`", program.instructions[*at].text));
                let waits: Vec<String> = waits.collect();
                return Err(format!("warp {} waits for itself: {}", self.number, waits.join(", ")));
            };
            let (at, lanes) = self.groups[behind];
            let instruction = &program.instructions[at];
            let active = match instruction.guard {
                Some((register, holds)) => {
                    let value = &self.registers[register as usize];
                    lanes & lanes_where(|lane| (value[lane] != 0) == holds)
                }
                None => lanes,
            };
            match instruction.operation {
                Operation::Branch(target) => {
                    self.groups[behind] = (at + 1, lanes & !active);
                    self.groups.push((target, active));
                    self.join();
                }
                Operation::Exit => {
                    self.groups[behind] = (at + 1, lanes & !active);
                    self.join();
                }
                Operation::Barrier => {
                    self.groups[behind].0 += 1;
                    return Ok(Stop::Barrier);
                }
                _ => {
                    if active != 0 {
                        self.execute(block, instruction, active)
                            .map_err(|problem| format!("`{}`, warp {}: {problem}", instruction.text, self.number))?;
                    }
                    self.groups[behind].0 += 1;
                    if self.groups.len() > 1 {
                        self.join();
                    }
                }
            }
        }
        Ok(Stop::End)
    }

    /// Whether a group can go on: what a warp does together waits for all lanes it names.
    fn is_ready(&self, block: &Block, group: usize) -> bool {
        let (at, lanes) = self.groups[group];
        let instruction = &block.program.instructions[at];
        let named = match instruction.operation {
            Operation::Barrier | Operation::LoadMatrices(..) | Operation::MultiplyAdd(_) => u32::MAX,
            Operation::Shuffle(_) => self.read(block, instruction.from[3])[lanes.trailing_zeros() as usize] as u32,
            _ => return true,
        };
        self.groups.iter().all(|(_, others)| others & named & !lanes == 0)
    }

    /// Lanes at the same instruction are one group again.
    fn join(&mut self) {
        self.groups.retain(|(_, lanes)| *lanes != 0);
        if self.groups.len() > 1 {
            self.groups.sort_unstable();
            self.groups.dedup_by(|next, first| {
                let same = next.0 == first.0;
                if same {
                    first.1 |= next.1;
                }
                same
            });
        }
    }

    fn execute(&mut self, block: &mut Block, instruction: &Instruction, active: u32) -> Result<(), String> {
        let from = &instruction.from;
        let to = &instruction.to;
        match instruction.operation {
            Operation::One(compute) => self.write(to[0], active, compute(&self.read(block, from[0]))),
            Operation::Two(compute) => {
                self.write(to[0], active, compute(&self.read(block, from[0]), &self.read(block, from[1])))
            }
            Operation::Three(compute) => {
                let [a, b, c] = from_fn(|i| self.read(block, from[i]));
                self.write(to[0], active, compute(&a, &b, &c));
            }
            Operation::Halves(compute) => {
                let operands: [Lanes; 3] = from_fn(|i| from.get(i).map_or([0; WARP], |one| self.read(block, *one)));
                let half = |shift: u32| operands.map(|one| one.map(|bits| bits >> shift & 0xffff));
                let ([a, b, c], [d, e, f]) = (half(0), half(16));
                let (low, high) = (compute(&a, &b, &c), compute(&d, &e, &f));
                self.write(to[0], active, from_fn(|lane| low[lane] | high[lane] << 16));
            }
            Operation::Compare(compare, join) => {
                let mut holds = compare(&self.read(block, from[0]), &self.read(block, from[1]));
                let mut opposite = holds.map(|one| 1 - one);
                if let (Some(join), Some(with)) = (join, from.get(2)) {
                    let with = self.read(block, *with);
                    (holds, opposite) = (join(&holds, &with), join(&opposite, &with));
                }
                self.write(to[0], active, holds);
                if let Some(second) = to.get(1) {
                    self.write(*second, active, opposite);
                }
            }
            Operation::Set(compare, value) => {
                let holds = compare(&self.read(block, from[0]), &self.read(block, from[1]));
                self.write(to[0], active, holds.map(|one| one * value));
            }
            Operation::Convert(convert) => {
                let value = self.read(block, from[0]);
                self.write(to[0], active, value.map(|bits| convert.apply(bits)));
            }
            Operation::Pack(bits) => {
                let mut value = [0; WARP];
                for (at, part) in from.iter().enumerate() {
                    let part = self.read(block, *part);
                    value = from_fn(|i| value[i] | (part[i] & ones(bits)) << (at as u32 * bits));
                }
                self.write(to[0], active, value);
            }
            Operation::Unpack(bits) => {
                let value = self.read(block, from[0]);
                for (at, register) in to.iter().enumerate() {
                    self.write(*register, active, value.map(|one| one >> (at as u32 * bits) & ones(bits)));
                }
            }
            Operation::Insert(width) => {
                let [a, b, at, length] = from_fn(|i| self.read(block, from[i]));
                let insert = |i| crate::arithmetic::insert_bits(a[i], b[i], at[i], length[i], width);
                self.write(to[0], active, from_fn(insert));
            }
            Operation::Load(space, bytes, signed) => self.load(block, instruction, active, (space, bytes, signed))?,
            Operation::Store(space, bytes) => self.store(block, instruction, active, (space, bytes))?,
            Operation::Atomic(space, bytes, compute) => {
                let addresses = self.addresses(block, from[0], from[1]);
                let operands = [2, 3].map(|at| from.get(at).map_or([0; WARP], |one| self.read(block, *one)));
                let _alone = block.atomics.lock();
                for lane in lanes_of(active) {
                    let memory = self.memory(block, space, lane, addresses[lane], bytes)?;
                    // SAFETY: `memory` is as large.
                    let old = unsafe { read_bytes(memory, bytes) };
                    let new = compute(old, operands[0][lane], operands[1][lane]);
                    // SAFETY: the same.
                    unsafe { copy_nonoverlapping(new.to_le_bytes().as_ptr(), memory, bytes as usize) };
                    self.registers[to[0] as usize][lane] = old;
                }
            }
            Operation::Shuffle(source) => {
                let [value, b, clamp] = from_fn(|i| self.read(block, from[i]));
                let mut out = [0; WARP];
                for lane in lanes_of(active) {
                    let source = source(lane as u32, b[lane] as u32, clamp[lane] as u32);
                    if active >> source & 1 == 0 {
                        return Err(format!("lane {lane} takes the value of lane {source}, which is not here"));
                    }
                    out[lane] = value[source as usize];
                }
                self.write(to[0], active, out);
            }
            Operation::CopyAsync(bytes) => {
                let [to, source] = [self.addresses(block, from[0], from[1]), self.addresses(block, from[2], from[3])];
                let valid = self.read(block, from[4]);
                for lane in lanes_of(active) {
                    let (to, from, valid) = (to[lane], source[lane], valid[lane] as u32);
                    if to % u64::from(bytes) != 0 || from % u64::from(bytes) != 0 {
                        return Err(format!("lane {lane}: an address is no multiple of {bytes}"));
                    }
                    self.open.push(Copy { to, from, bytes, valid: valid.min(bytes) });
                }
            }
            Operation::Commit => self.under_way.push_back(std::mem::take(&mut self.open)),
            Operation::Wait(groups) => {
                while self.under_way.len() > groups {
                    for copy in self.under_way.pop_front().unwrap_or_default() {
                        self.land(block, &copy)?;
                    }
                }
            }
            Operation::LoadMatrices(count, transposed) => {
                self.load_matrices(block, instruction, active, count, transposed)?
            }
            Operation::MultiplyAdd(number) => self.multiply_add(block, instruction, active, number)?,
            Operation::Trap(problem) => return Err(problem.to_owned()),
            Operation::Branch(_) | Operation::Exit | Operation::Barrier | Operation::Nothing => {}
        }
        Ok(())
    }

    pub(crate) fn read(&self, block: &Block, operand: Operand) -> Lanes {
        let first = (self.number * WARP) as u32;
        match operand {
            Operand::Register(register) => self.registers[register as usize],
            Operand::Constant(value) => [value; WARP],
            Operand::Special(Special::Lane) => from_fn(|lane| lane as u64),
            Operand::Special(Special::Threads(axis)) => [u64::from(block.threads[axis]); WARP],
            Operand::Special(Special::Block(axis)) => [u64::from(block.index[axis]); WARP],
            Operand::Special(Special::Blocks(axis)) => [u64::from(block.blocks[axis]); WARP],
            Operand::Special(Special::Thread(axis)) => from_fn(|lane| {
                let below: u32 = block.threads[..axis].iter().product();
                u64::from((first + lane as u32) / below % block.threads[axis])
            }),
        }
    }

    pub(crate) fn write(&mut self, register: u32, active: u32, value: Lanes) {
        let register = &mut self.registers[register as usize];
        if active == u32::MAX {
            *register = value;
        } else {
            *register = from_fn(|lane| if active >> lane & 1 == 1 { value[lane] } else { register[lane] });
        }
    }

    pub(crate) fn addresses(&self, block: &Block, base: Operand, offset: Operand) -> Lanes {
        let (base, offset) = (self.read(block, base), self.read(block, offset));
        from_fn(|lane| base[lane].wrapping_add(offset[lane]))
    }

    /// Where a lane's address lies on the host.
    pub(crate) fn memory(
        &mut self,
        block: &mut Block,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<*mut u8, String> {
        let size = u64::from(bytes);
        if !address.is_multiple_of(size) {
            return Err(format!("lane {lane}: address {address:#x} is no multiple of {bytes}"));
        }
        let (space, offset) = match space {
            Space::Generic if address >= LOCAL => (Space::Local, address - LOCAL),
            Space::Generic if address >= SHARED => (Space::Shared, address - SHARED),
            Space::Shared | Space::Local => (space, address & 0xffff_ffff),
            _ => (space, address),
        };
        let window = match space {
            Space::Shared => &mut block.shared[..],
            Space::Local => {
                let own = block.program.local_bytes;
                &mut self.local[lane * own..][..own]
            }
            _ => {
                if address < self.last.0 || address + size > self.last.1 {
                    let found = find(block.allocations, address, size);
                    self.last =
                        found.ok_or_else(|| format!("lane {lane}: {address:#x} is outside of what is allocated"))?;
                }
                return Ok(address as *mut u8);
            }
        };
        if offset + size > window.len() as u64 {
            return Err(format!("lane {lane}: {offset:#x} is outside of {} bytes of {space:?} memory", window.len()));
        }
        Ok(window[offset as usize..].as_mut_ptr())
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
            let memory = if space == Space::Parameter {
                let at = addresses[lane] as usize;
                let argument = block.parameters.get(at..at + all as usize).ok_or("outside of the arguments")?;
                argument.as_ptr().cast_mut()
            } else {
                self.memory(block, space, lane, addresses[lane], all)?
            };
            for (at, register) in instruction.to.iter().enumerate() {
                // SAFETY: `memory` has `all` bytes.
                let value = unsafe { read_bytes(memory.add(at * bytes as usize), bytes) };
                let value = if signed { ((value << unused).cast_signed() >> unused).cast_unsigned() } else { value };
                self.registers[*register as usize][lane] = value;
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
            let memory = self.memory(block, space, lane, addresses[lane], bytes * values.len() as u32)?;
            for (at, value) in values.iter().enumerate() {
                let value = match *value {
                    Operand::Register(register) => self.registers[register as usize][lane],
                    other => self.read(block, other)[lane],
                };
                let to = memory.wrapping_add(at * bytes as usize);
                // SAFETY: `memory` has room for all values. Blocks that write the same bytes race, as on the device.
                unsafe { copy_nonoverlapping(value.to_le_bytes().as_ptr(), to, bytes as usize) };
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

fn lanes_of(active: u32) -> impl Iterator<Item = usize> {
    (0..WARP).filter(move |lane| active >> lane & 1 == 1)
}

fn lanes_where(holds: impl Fn(usize) -> bool) -> u32 {
    (0..WARP).fold(0, |lanes, lane| lanes | u32::from(holds(lane)) << lane)
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
