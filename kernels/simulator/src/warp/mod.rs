//! [`Warp`]: 32 threads that execute in lockstep. Lanes that diverge run in turn, those furthest behind first, until they
//! reach the same instruction again; at warp-wide instructions they wait for each other.

mod copies;
mod execute;
mod hazards;
mod mma;
mod sync;
mod wgmma;

use crate::barriers::{Arrival, Barriers};
use crate::instruction::{Instruction, Lanes, Operand, Operation, Space, SpecialRegister, WARP_SIZE};
use crate::memory::{Allocations, find, resolve, within};
use crate::program::Program;
use crate::schedule::Schedule;
use copies::PendingCopies;
use hazards::LaneAccesses;
use std::array::from_fn;
use std::sync::Mutex;
use sync::FailedPolls;
use wgmma::WgmmaState;

/// What the warps of a block share.
pub struct Block<'a> {
    /// The kernel.
    pub program: &'a Program,
    /// The launch's arguments.
    pub parameters: &'a [u8],
    /// Device memory.
    pub allocations: &'a Allocations,
    /// Held during an atomic operation.
    pub atomics: &'a Mutex<()>,
    /// Shared memory.
    pub shared: Vec<u8>,
    /// The barriers of this block.
    pub barriers: Barriers,
    /// Threads of a block, by axis.
    pub threads: [u32; 3],
    /// Blocks of the grid, by axis.
    pub blocks: [u32; 3],
    /// Index of this block, by axis.
    pub index: [u32; 3],
    /// How this launch is executed.
    pub schedule: Schedule,
}

/// Lanes that are at the same instruction.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct LaneGroup {
    /// Index of the next instruction.
    at: usize,
    lanes: u32,
}

/// A warp and its registers.
pub struct Warp {
    number: usize,
    /// Lanes that exist; the last warp of a block may have fewer than 32.
    lanes: u32,
    registers: Vec<Lanes>,
    /// How many `wgmma.fence` had been executed when each register was last written.
    fences_at_write: Vec<u32>,
    fences: u32,
    /// All lanes that have not exited.
    groups: Vec<LaneGroup>,
    local: Vec<u8>,
    copies: PendingCopies,
    /// The warp's `wgmma`s.
    pub(crate) wgmma: WgmmaState,
    /// The thread barrier at which the warp waits.
    waiting_at: Option<Arrival>,
    polls: FailedPolls,
    accesses: LaneAccesses,
    /// Begin and end of the allocation that was accessed last.
    last_allocation: (u64, u64),
}

/// Why a warp stopped running.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum WarpStatus {
    /// It waits for other warps, or gives way to those that waited for it.
    Waiting,
    /// All lanes have exited.
    Ended,
}

impl Warp {
    /// A warp of this number in its block.
    pub fn new(program: &Program, number: usize) -> Self {
        Self {
            number,
            lanes: 0,
            registers: vec![[0; WARP_SIZE]; program.registers],
            fences_at_write: vec![0; program.registers],
            fences: 0,
            groups: Vec::new(),
            local: vec![0; program.local_bytes * WARP_SIZE],
            copies: PendingCopies::default(),
            wgmma: WgmmaState::default(),
            waiting_at: None,
            polls: FailedPolls::default(),
            accesses: LaneAccesses::default(),
            last_allocation: (1, 0),
        }
    }

    /// Starts a block, with registers and local memory full of NaN.
    pub fn begin(&mut self, block: &Block) {
        let threads = block.threads.iter().product::<u32>() as usize - self.number * WARP_SIZE;
        self.lanes = if threads >= WARP_SIZE { u32::MAX } else { (1 << threads) - 1 };
        self.groups = vec![LaneGroup { at: 0, lanes: self.lanes }];
        self.registers.fill([u64::MAX; WARP_SIZE]);
        self.local.fill(0xff);
        self.copies = PendingCopies::default();
        self.fences_at_write.fill(0);
        self.fences = 0;
        self.wgmma = WgmmaState::default();
        self.waiting_at = None;
        self.polls = FailedPolls::default();
        self.accesses.order();
    }

    /// Whether all lanes have exited.
    pub fn has_ended(&self) -> bool {
        self.groups.is_empty()
    }

    /// Runs until the warp waits or ends.
    ///
    /// # Errors
    /// A fault, with instruction and lane.
    pub fn run(&mut self, block: &mut Block) -> Result<WarpStatus, String> {
        if let Some(arrival) = self.waiting_at {
            if !block.barriers.has_completed(arrival) {
                return Ok(WarpStatus::Waiting);
            }
            self.waiting_at = None;
            self.groups[0].at += 1;
        }
        while !self.groups.is_empty() {
            let Some(next) = self.next_group(block)? else { return Ok(WarpStatus::Waiting) };
            let text = &block.program.instructions[self.groups[next].at].text;
            let phases = block.barriers.phases;
            self.step(block, next).map_err(|fault| format!("`{text}`, warp {}: {fault}", self.number))?;
            // When this warp completes a phase, those that wait for it run first. So they see none of what this warp should
            // have written before it arrived but writes only afterwards.
            let completed_phase = block.barriers.phases != phases;
            if self.waiting_at.is_some() || completed_phase && !self.has_ended() {
                return Ok(WarpStatus::Waiting);
            }
        }
        block.barriers.end_warp().map_err(|fault| format!("warp {}: {fault}", self.number))?;
        self.wgmma.pending().map_or(Ok(WarpStatus::Ended), |at| {
            let text = &block.program.instructions[at].text;
            Err(format!("`{text}`, warp {}: the warp ends without waiting for it", self.number))
        })
    }

    /// The group furthest behind of those that can run; none if all of them wait for other warps.
    fn next_group(&self, block: &Block) -> Result<Option<usize>, String> {
        let groups = &self.groups;
        let is_polling = |at: usize| self.polls.is_suspended(block.barriers.events, groups[at]);
        let can_run = |at: &usize| !is_polling(*at) && (groups.len() == 1 || self.is_converged(block, *at));
        let next = (0..groups.len()).filter(can_run).min_by_key(|at| groups[*at].at);
        if next.is_none() && !(0..groups.len()).any(is_polling) {
            return Err(format!("diverged lanes wait for each other: {}", self.position(block)));
        }
        Ok(next)
    }

    /// Where the lanes are, for error messages.
    pub fn position(&self, block: &Block) -> String {
        let describe =
            |group: &LaneGroup| format!("lanes {:#x} at `{}`", group.lanes, block.program.instructions[group.at].text);
        format!("warp {}, {}", self.number, self.groups.iter().map(describe).collect::<Vec<_>>().join(", "))
    }

    /// Executes one instruction of a group.
    fn step(&mut self, block: &mut Block, group: usize) -> Result<(), String> {
        let LaneGroup { at, lanes } = self.groups[group];
        let instruction = &block.program.instructions[at];
        let active = self.active_lanes(instruction, lanes);
        match instruction.operation {
            Operation::Branch(target) => {
                self.groups.push(LaneGroup { at: target, lanes: active });
                self.leave(group, active);
                return Ok(());
            }
            Operation::Exit => {
                self.leave(group, active);
                return Ok(());
            }
            _ if active == 0 => {}
            Operation::Barrier { waits } => {
                let arrival = self.arrive_at_thread_barrier(block, instruction, lanes, active)?;
                if waits {
                    self.waiting_at = Some(arrival);
                    return Ok(());
                }
            }
            Operation::TestBarrier(space) => {
                if !self.test_barriers(block, instruction, self.groups[group], active, space)? {
                    return Ok(());
                }
            }
            _ => self.execute(block, at, active)?,
        }
        self.groups[group].at += 1;
        if self.groups.len() > 1 {
            self.merge_groups();
        }
        Ok(())
    }

    /// The lanes of a group for which an instruction's guard holds.
    fn active_lanes(&self, instruction: &Instruction, lanes: u32) -> u32 {
        let Some((register, value)) = instruction.guard else { return lanes };
        let predicate = &self.registers[register as usize];
        lanes & lanes_where(|lane| (predicate[lane] != 0) == value)
    }

    /// These lanes of a group branched or exited; the others go on.
    fn leave(&mut self, group: usize, leaving: u32) {
        self.groups[group].at += 1;
        self.groups[group].lanes &= !leaving;
        self.merge_groups();
    }

    /// Whether all lanes that take part in a group's next instruction are in this group.
    fn is_converged(&self, block: &Block, group: usize) -> bool {
        let LaneGroup { at, lanes } = self.groups[group];
        let instruction = &block.program.instructions[at];
        let first_lane = lanes.trailing_zeros() as usize;
        let mask_operand = |at: usize| self.read_lane(block, instruction.from[at], first_lane) as u32;
        let participants = match instruction.operation {
            Operation::Barrier { .. }
            | Operation::LoadMatrices { .. }
            | Operation::Mma(_)
            | Operation::WgmmaFence
            | Operation::Wgmma(_)
            | Operation::WgmmaCommit
            | Operation::WgmmaWait(_) => u32::MAX,
            Operation::Shuffle(_) => mask_operand(3),
            Operation::WarpSync | Operation::Elect => mask_operand(0),
            _ => return true,
        };
        self.groups.iter().all(|other| other.lanes & participants & !lanes == 0)
    }

    /// Merges groups at the same instruction.
    fn merge_groups(&mut self) {
        self.groups.retain(|group| group.lanes != 0);
        if self.groups.len() > 1 {
            self.groups.sort_unstable();
            self.groups.dedup_by(|next, first| {
                let same = next.at == first.at;
                if same {
                    first.lanes |= next.lanes;
                }
                same
            });
        }
    }

    /// Lanes that have not exited.
    fn running_lanes(&self) -> u32 {
        self.groups.iter().fold(0, |lanes, group| lanes | group.lanes)
    }

    fn read(&self, block: &Block, operand: Operand) -> Lanes {
        let first_thread = (self.number * WARP_SIZE) as u32;
        match operand {
            Operand::Register(register) => self.registers[register as usize],
            Operand::Constant(value) => [value; WARP_SIZE],
            Operand::Special(SpecialRegister::LaneId) => from_fn(|lane| lane as u64),
            Operand::Special(SpecialRegister::Ntid(axis)) => [u64::from(block.threads[axis]); WARP_SIZE],
            Operand::Special(SpecialRegister::Ctaid(axis)) => [u64::from(block.index[axis]); WARP_SIZE],
            Operand::Special(SpecialRegister::Nctaid(axis)) => [u64::from(block.blocks[axis]); WARP_SIZE],
            Operand::Special(SpecialRegister::Tid(axis)) => from_fn(|lane| {
                let stride: u32 = block.threads[..axis].iter().product();
                u64::from((first_thread + lane as u32) / stride % block.threads[axis])
            }),
        }
    }

    fn read_lane(&self, block: &Block, operand: Operand, lane: usize) -> u64 {
        match operand {
            Operand::Register(register) => self.registers[register as usize][lane],
            other => self.read(block, other)[lane],
        }
    }

    fn write(&mut self, register: u32, active: u32, value: Lanes) {
        self.fences_at_write[register as usize] = self.fences;
        let register = &mut self.registers[register as usize];
        if active == u32::MAX {
            *register = value;
        } else {
            *register = from_fn(|lane| if active >> lane & 1 == 1 { value[lane] } else { register[lane] });
        }
    }

    fn write_lane(&mut self, register: u32, lane: usize, value: u64) {
        self.fences_at_write[register as usize] = self.fences;
        self.registers[register as usize][lane] = value;
    }

    /// The sum of two operands, a base address and an offset.
    fn addresses(&self, block: &Block, base: Operand, offset: Operand) -> Lanes {
        let base = self.read(block, base);
        let offset = self.read(block, offset);
        from_fn(|lane| base[lane].wrapping_add(offset[lane]))
    }

    /// The host address of an access, which must be aligned to its size.
    fn host_address(
        &mut self,
        block: &mut Block,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<*mut u8, String> {
        if !address.is_multiple_of(u64::from(bytes)) {
            return Err(format!("lane {lane}: address {address:#x} is not a multiple of {bytes}"));
        }
        self.unaligned_host_address(block, space, lane, address, bytes)
    }

    /// The host address of an access of any alignment. Kernel arguments must only be read.
    fn unaligned_host_address(
        &mut self,
        block: &mut Block,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<*mut u8, String> {
        let bytes = u64::from(bytes);
        let (space, offset) = resolve(space, address);
        let local_bytes = block.program.local_bytes;
        let (memory, window) = match space {
            Space::Shared => (block.shared.as_mut_ptr(), block.shared.len()),
            Space::Local => (self.local[lane * local_bytes..].as_mut_ptr(), local_bytes),
            Space::Parameter => (block.parameters.as_ptr().cast_mut(), block.parameters.len()),
            Space::Generic => {
                if address < self.last_allocation.0 || address + bytes > self.last_allocation.1 {
                    let allocation = find(block.allocations, address, bytes);
                    self.last_allocation =
                        allocation.ok_or_else(|| format!("lane {lane}: {address:#x} is not allocated"))?;
                }
                return Ok(address as *mut u8);
            }
        };
        match within(window, offset, bytes) {
            Some(range) => Ok(memory.wrapping_add(range.start)),
            None => Err(format!("lane {lane}: {offset:#x} is outside of {window} bytes of {space:?} memory")),
        }
    }
}

/// The lanes of a mask.
fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..WARP_SIZE).filter(move |lane| mask >> lane & 1 == 1)
}

/// The mask of lanes for which this holds.
fn lanes_where(holds: impl Fn(usize) -> bool) -> u32 {
    (0..WARP_SIZE).fold(0, |mask, lane| mask | u32::from(holds(lane)) << lane)
}

/// The value that all active lanes have in common.
fn uniform_value(value: &Lanes, active: u32) -> Result<u64, String> {
    let first = value[active.trailing_zeros() as usize % WARP_SIZE];
    match lanes_of(active).find(|lane| value[*lane] != first) {
        Some(lane) => Err(format!("lane {lane} has {:#x} where others have {first:#x}", value[lane])),
        None => Ok(first),
    }
}

fn require_all_lanes(active: u32) -> Result<(), String> {
    if active == u32::MAX { Ok(()) } else { Err("not all lanes of the warp are active".to_owned()) }
}
