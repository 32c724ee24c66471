//! [`Warp`]: 32 threads in step. Lanes that part go on in turn, those furthest behind first, until they meet again;
//! where a warp works together, they wait for each other.

use crate::barriers::{Barriers, Turn, Waits};
use crate::instruction::{Lanes, Operand, Operation, Space, Special, WARP};
use crate::memory::{Allocations, find, resolve, within};
use crate::products::Products;
use crate::program::Program;
use std::array::from_fn;
use std::collections::VecDeque;
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
    /// What its warps wait for.
    pub barriers: Barriers,
    /// Threads of a block, blocks of the grid, and where this one stands in it.
    pub threads: [u32; 3],
    /// See `threads`.
    pub blocks: [u32; 3],
    /// See `threads`.
    pub index: [u32; 3],
}

/// A warp that runs.
pub struct Warp {
    pub(crate) number: usize,
    registers: Vec<Lanes>,
    /// After how many fences of products each was last written, and how many there were.
    written: Vec<u32>,
    fences: u32,
    /// Where lanes are that run, each group at another instruction.
    groups: Vec<(usize, u32)>,
    local: Vec<u8>,
    /// Copies to shared memory that no group has yet, and the groups under way.
    pub(crate) open: Vec<Copy>,
    pub(crate) under_way: VecDeque<Vec<Copy>>,
    pub(crate) products: Products,
    /// The barrier of threads at which it waits, and groups that wait at others.
    turn: Option<Turn>,
    pub(crate) waits: Waits,
    /// The allocation of the last access.
    last: (u64, u64),
}

/// A copy of a lane to shared memory.
pub(crate) struct Copy {
    pub to: u64,
    pub from: u64,
    pub bytes: u32,
    /// Those taken from there; the others become zeros.
    pub valid: u32,
}

/// Why a warp stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It waits for other warps.
    Wait,
    /// All lanes have ended.
    End,
}

impl Warp {
    /// A warp of this number in its block, at the beginning of a program.
    pub fn new(program: &Program, number: usize) -> Self {
        Self {
            number,
            registers: vec![[0; WARP]; program.registers],
            written: vec![0; program.registers],
            fences: 0,
            groups: Vec::new(),
            local: vec![0; program.local_bytes * WARP],
            open: Vec::new(),
            under_way: VecDeque::new(),
            products: Products::default(),
            turn: None,
            waits: Waits::default(),
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
        self.written.fill(0);
        self.fences = 0;
        (self.products, self.turn, self.waits) = (Products::default(), None, Waits::default());
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
        if let Some(turn) = self.turn {
            if !block.barriers.is_over(turn) {
                return Ok(Stop::Wait);
            }
            self.turn = None;
            self.groups[0].0 += 1;
        }
        while !self.groups.is_empty() {
            let Some(next) = self.next(block)? else { return Ok(Stop::Wait) };
            let text = &block.program.instructions[self.groups[next].0].text;
            let before = block.barriers.phases;
            self.step(block, next).map_err(|problem| format!("`{text}`, warp {}: {problem}", self.number))?;
            // Whoever waited for this phase goes on before this warp does, so that nothing may be told too early.
            if self.turn.is_some() || block.barriers.phases != before && !self.ended() {
                return Ok(Stop::Wait);
            }
        }
        block.barriers.end_warp();
        self.products.under_way().map_or(Ok(Stop::End), |at| {
            let text = &block.program.instructions[at].text;
            Err(format!("`{text}`, warp {}: the warp ends and did not wait for it", self.number))
        })
    }

    /// The group furthest behind of those that can go on; none if they wait for other warps.
    fn next(&self, block: &Block) -> Result<Option<usize>, String> {
        let (groups, changes) = (&self.groups, block.barriers.changes);
        let aside = |at: &usize| self.waits.is_aside(changes, groups[*at]);
        let ready = (0..groups.len()).filter(|at| !aside(at) && (groups.len() == 1 || self.is_ready(block, *at)));
        match ready.min_by_key(|at| groups[*at].0) {
            None if !(0..groups.len()).any(|at| aside(&at)) => {
                Err(format!("lanes wait for each other: {}", self.place_of(block)))
            }
            next => Ok(next),
        }
    }

    /// Where its lanes are, for messages.
    pub fn place_of(&self, block: &Block) -> String {
        let place =
            |(at, lanes): &(usize, u32)| format!("lanes {lanes:#x} at `{}`", block.program.instructions[*at].text);
        format!("warp {}, {}", self.number, self.groups.iter().map(place).collect::<Vec<_>>().join(", "))
    }

    /// One instruction of a group.
    fn step(&mut self, block: &mut Block, group: usize) -> Result<(), String> {
        let (at, lanes) = self.groups[group];
        let instruction = &block.program.instructions[at];
        let active = match instruction.guard {
            Some((register, holds)) => {
                let value = &self.registers[register as usize];
                lanes & lanes_where(|lane| (value[lane] != 0) == holds)
            }
            None => lanes,
        };
        match instruction.operation {
            Operation::Branch(target) => {
                self.groups[group] = (at + 1, lanes & !active);
                self.groups.push((target, active));
                self.join();
                return Ok(());
            }
            Operation::Exit => {
                self.groups[group] = (at + 1, lanes & !active);
                self.join();
                return Ok(());
            }
            _ if active == 0 => {}
            Operation::Barrier(waits) => {
                let turn = self.arrive(block, instruction, (lanes, active))?;
                if waits {
                    self.turn = Some(turn);
                    return Ok(());
                }
            }
            Operation::TestBarrier(space) => {
                if !self.test_barriers(block, instruction, (at, lanes), active, space)? {
                    return Ok(());
                }
            }
            _ => self.execute(block, at, active)?,
        }
        self.groups[group].0 += 1;
        if self.groups.len() > 1 {
            self.join();
        }
        Ok(())
    }

    /// Whether a group can go on: what a warp does together waits for all lanes it names.
    fn is_ready(&self, block: &Block, group: usize) -> bool {
        let (at, lanes) = self.groups[group];
        let instruction = &block.program.instructions[at];
        let named = |at: usize| self.read_lane(block, instruction.from[at], lanes.trailing_zeros() as usize) as u32;
        let named = match instruction.operation {
            Operation::Barrier(_)
            | Operation::LoadMatrices(..)
            | Operation::MultiplyAdd(_)
            | Operation::FenceProducts
            | Operation::BeginProduct(_)
            | Operation::CommitProducts
            | Operation::AwaitProducts(_) => u32::MAX,
            Operation::Shuffle(_) => named(3),
            Operation::Meet | Operation::Elect => named(0),
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

    pub(crate) fn read_lane(&self, block: &Block, operand: Operand, lane: usize) -> u64 {
        match operand {
            Operand::Register(register) => self.registers[register as usize][lane],
            other => self.read(block, other)[lane],
        }
    }

    pub(crate) fn write(&mut self, register: u32, active: u32, value: Lanes) {
        self.written[register as usize] = self.fences;
        let register = &mut self.registers[register as usize];
        if active == u32::MAX {
            *register = value;
        } else {
            *register = from_fn(|lane| if active >> lane & 1 == 1 { value[lane] } else { register[lane] });
        }
    }

    pub(crate) fn set(&mut self, register: u32, lane: usize, value: u64) {
        self.written[register as usize] = self.fences;
        self.registers[register as usize][lane] = value;
    }

    /// What a product writes, which needs no fence.
    pub(crate) fn overwrite(&mut self, register: u32, value: Lanes) {
        self.registers[register as usize] = value;
    }

    /// What was written so far may be used by products.
    pub(crate) fn fence(&mut self) {
        self.fences += 1;
    }

    /// Whether no fence followed when it was last written. What was never written counts as written before the first one.
    pub(crate) fn is_written_since_fence(&self, register: u32) -> bool {
        self.written[register as usize] == self.fences
    }

    pub(crate) fn addresses(&self, block: &Block, base: Operand, offset: Operand) -> Lanes {
        let (base, offset) = (self.read(block, base), self.read(block, offset));
        from_fn(|lane| base[lane].wrapping_add(offset[lane]))
    }

    /// Where a lane's address lies on the host. Arguments are only to be read.
    pub(crate) fn memory(
        &mut self,
        block: &mut Block,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<*mut u8, String> {
        if !address.is_multiple_of(u64::from(bytes)) {
            return Err(format!("lane {lane}: address {address:#x} is no multiple of {bytes}"));
        }
        self.place(block, space, lane, address, bytes)
    }

    /// The same of an address that need be no multiple.
    pub(crate) fn place(
        &mut self,
        block: &mut Block,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<*mut u8, String> {
        let (size, (space, offset)) = (u64::from(bytes), resolve(space, address));
        let own = block.program.local_bytes;
        let (memory, window) = match space {
            Space::Shared => (block.shared.as_mut_ptr(), block.shared.len()),
            Space::Local => (self.local[lane * own..].as_mut_ptr(), own),
            Space::Parameter => (block.parameters.as_ptr().cast_mut(), block.parameters.len()),
            Space::Generic => {
                if address < self.last.0 || address + size > self.last.1 {
                    let found = find(block.allocations, address, size);
                    self.last =
                        found.ok_or_else(|| format!("lane {lane}: {address:#x} is outside of what is allocated"))?;
                }
                return Ok(address as *mut u8);
            }
        };
        match within(window, offset, size) {
            Some(bytes) => Ok(memory.wrapping_add(bytes.start)),
            None => Err(format!("lane {lane}: {offset:#x} is outside of {window} bytes of {space:?} memory")),
        }
    }
}

/// Those of a mask.
pub(crate) fn lanes_of(active: u32) -> impl Iterator<Item = usize> {
    (0..WARP).filter(move |lane| active >> lane & 1 == 1)
}

/// The mask of those for which it holds.
pub(crate) fn lanes_where(holds: impl Fn(usize) -> bool) -> u32 {
    (0..WARP).fold(0, |lanes, lane| lanes | u32::from(holds(lane)) << lane)
}

/// What these lanes have in common.
pub(crate) fn uniform(value: &Lanes, active: u32) -> Result<u64, String> {
    let first = value[active.trailing_zeros() as usize % WARP];
    match lanes_of(active).find(|lane| value[*lane] != first) {
        Some(lane) => Err(format!("lane {lane} has {:#x} where others have {first:#x}", value[lane])),
        None => Ok(first),
    }
}
