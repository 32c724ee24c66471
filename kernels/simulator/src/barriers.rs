//! [`Barriers`]: what the warps of a block wait for: barriers of threads, and words of shared memory at which threads and
//! copies arrive. A copy lands when nothing else is missing for the phase of a barrier that is asked about.

use crate::instruction::{Instruction, Lanes, Space, WARP};
use crate::memory::{resolve, within};
use crate::tensor_map::BoxCopy;
use crate::warp::{Block, Warp, lanes_of, lanes_where, uniform};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::{Display, Formatter};

/// Most arrivals, and most bytes that are still to come.
const MOST: u64 = (1 << 20) - 1;

/// Of a block.
#[derive(Default)]
pub struct Barriers {
    /// How often something changed that a warp may wait for.
    pub changes: u64,
    /// Phases that have ended.
    pub phases: u64,
    /// Warps that have not ended.
    warps: usize,
    of_threads: [OfThreads; 16],
    /// In shared memory, by where they lie there.
    words: BTreeMap<u64, Word>,
    /// Under way, oldest first.
    copies: VecDeque<BoxCopy>,
}

#[derive(Clone, Copy, Default)]
struct OfThreads {
    arrived: u64,
    /// All of the block that have not ended, if it does not say how many.
    wanted: Option<u64>,
    /// How often it was complete.
    turn: u64,
}

/// A barrier in shared memory.
struct Word {
    /// Arrivals of each phase.
    count: u64,
    /// Those missing in this one.
    missing: u64,
    /// Bytes that are to come; copies may be ahead of those who announce them.
    bytes: i64,
    phase: u64,
}

/// A barrier of threads, and how often it was complete when a warp arrived.
pub type Turn = (usize, u64);

/// Groups of lanes that found a phase not over since anything last changed: those that may ask once more, and those that
/// did.
#[derive(Default)]
pub struct Waits {
    changes: u64,
    once: Vec<(usize, u32)>,
    aside: Vec<(usize, u32)>,
}

impl Waits {
    /// A group found a phase not over; whether it is put aside.
    fn fails(&mut self, changes: u64, group: (usize, u32)) -> bool {
        if self.changes != changes {
            *self = Self { changes, ..Self::default() };
        }
        let again = self.once.contains(&group);
        if again { &mut self.aside } else { &mut self.once }.push(group);
        again
    }

    /// Whether a group is put aside until something changes.
    pub fn is_aside(&self, changes: u64, group: (usize, u32)) -> bool {
        self.changes == changes && self.aside.contains(&group)
    }
}

impl Word {
    /// Arrivals, and bytes that are to come or have come; whether that ends the phase, as nothing is missing.
    fn change(&mut self, arrivals: u64, bytes: i64) -> Result<bool, String> {
        self.bytes += bytes;
        if self.bytes.unsigned_abs() > MOST {
            return Err(format!("{} bytes are to come, more than a barrier counts", self.bytes));
        }
        if arrivals > self.missing {
            return Err(format!("{arrivals} arrive where {} are missing in phase {}", self.missing, self.phase));
        }
        self.missing -= arrivals;
        let ends = self.missing == 0 && self.bytes == 0;
        if ends {
            (self.phase, self.missing) = (self.phase + 1, self.count);
        }
        Ok(ends)
    }
}

impl Display for Barriers {
    fn fmt(&self, out: &mut Formatter) -> std::fmt::Result {
        for (at, word) in &self.words {
            let Word { missing, bytes, phase, .. } = word;
            write!(out, "; barrier {at:#x} in phase {phase} misses {missing} arrivals and {bytes} bytes")?;
        }
        Ok(())
    }
}

impl Barriers {
    /// Of a block of so many warps.
    pub fn new(warps: usize) -> Self {
        Self { warps, ..Self::default() }
    }

    /// A warp arrives at a barrier of threads, of which it may then wait for the turn to be over.
    fn arrive(&mut self, number: u64, wanted: Option<u64>) -> Result<Turn, String> {
        let found = self.of_threads.get_mut(number as usize);
        let found = found.ok_or_else(|| format!("there is no barrier {number}"))?;
        if wanted.is_some_and(|count| count == 0 || !count.is_multiple_of(WARP as u64)) {
            return Err("its threads are no whole number of warps".to_owned());
        }
        if found.arrived > 0 && found.wanted != wanted {
            let others = found.wanted.map_or("all".to_owned(), |count| count.to_string());
            return Err(format!("others wait there for {others} threads"));
        }
        found.wanted = wanted;
        found.arrived += WARP as u64;
        let turn = (number as usize, found.turn);
        self.settle();
        Ok(turn)
    }

    /// Something changed; barriers of threads may be complete now.
    fn settle(&mut self) {
        self.changes += 1;
        for one in self.of_threads.iter_mut().filter(|one| one.arrived > 0) {
            if one.arrived >= one.wanted.unwrap_or((self.warps * WARP) as u64) {
                (one.arrived, one.turn) = (0, one.turn + 1);
            }
        }
    }

    /// Whether a barrier of threads was complete since.
    pub fn is_over(&self, turn: Turn) -> bool {
        self.of_threads[turn.0].turn != turn.1
    }

    /// A warp has ended.
    pub fn end_warp(&mut self) {
        self.warps -= 1;
        self.settle();
    }

    /// A block has ended.
    pub fn end(&self) -> Result<(), String> {
        self.copies.front().map_or(Ok(()), |copy| Err(format!("`{}` is under way when the block ends", copy.text)))
    }

    fn make(&mut self, at: u64, count: u64) -> Result<(), String> {
        if count == 0 || count > MOST {
            return Err(format!("no barrier is for {count} arrivals"));
        }
        self.changes += 1;
        let made = Word { count, missing: count, bytes: 0, phase: 0 };
        self.words.insert(at, made).map_or(Ok(()), |_| Err(format!("{at:#x} is a barrier already")))
    }

    fn drop(&mut self, at: u64) -> Result<(), String> {
        self.word(at)?;
        self.words.remove(&at);
        let copies = self.copies.iter().any(|copy| copy.barrier == at);
        if copies { Err("copies are under way to it".to_owned()) } else { Ok(()) }
    }

    fn word(&mut self, at: u64) -> Result<&mut Word, String> {
        self.words.get_mut(&at).ok_or_else(|| format!("{at:#x} was not made a barrier"))
    }

    fn change(&mut self, at: u64, arrivals: u64, bytes: i64) -> Result<(), String> {
        self.changes += 1;
        let ends = self.word(at)?.change(arrivals, bytes)?;
        self.phases += u64::from(ends);
        Ok(())
    }

    /// A copy is under way.
    pub fn begin_copy(&mut self, copy: BoxCopy) -> Result<(), String> {
        self.word(copy.barrier)?;
        let place = copy.place();
        let beside = |other: &BoxCopy| other.place().end <= place.start || place.end <= other.place().start;
        if let Some(other) = self.copies.iter().find(|other| !beside(other)) {
            return Err(format!("`{}` is under way to there", other.text));
        }
        self.copies.push_back(copy);
        Ok(())
    }
}

impl Block<'_> {
    /// Where a barrier lies in shared memory.
    pub(crate) fn barrier(&self, space: Space, lane: usize, address: u64) -> Result<u64, String> {
        let (space, at) = resolve(space, address);
        if space != Space::Shared || at % 8 != 0 || within(self.shared.len(), at, 8).is_none() {
            return Err(format!(
                "lane {lane}: {at:#x} is no whole word of {} bytes of shared memory",
                self.shared.len()
            ));
        }
        Ok(at)
    }

    /// Whether a phase is over; copies land if that ends it.
    fn is_over(&mut self, at: u64, parity: u64) -> Result<bool, String> {
        loop {
            let word = self.barriers.word(at)?;
            if word.phase & 1 != parity {
                return Ok(true);
            }
            if word.missing > 0 {
                return Ok(false);
            }
            let next = self.barriers.copies.iter().position(|copy| copy.barrier == at);
            let Some(copy) = next.and_then(|next| self.barriers.copies.remove(next)) else { return Ok(false) };
            copy.land(&mut self.shared, self.allocations).map_err(|problem| format!("`{}`: {problem}", copy.text))?;
            self.barriers.change(at, 0, -(copy.bytes() as i64))?;
        }
    }
}

impl Warp {
    /// At a barrier of threads.
    pub(crate) fn arrive(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        (lanes, active): (u32, u32),
    ) -> Result<Turn, String> {
        if lanes != active {
            return Err("lanes part here".to_owned());
        }
        let mut operands = Vec::new();
        for operand in &instruction.from {
            operands.push(uniform(&self.read(block, *operand), active)?);
        }
        block.barriers.arrive(operands[0], operands.get(1).copied())
    }

    /// Each lane with the barrier at its address and its operands.
    pub(crate) fn on_barriers(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        space: Space,
        act: fn(&mut Barriers, u64, &[u64]) -> Result<u64, String>,
    ) -> Result<(), String> {
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        let operands: Vec<Lanes> = instruction.from[2..].iter().map(|one| self.read(block, *one)).collect();
        let mut results = [0; WARP];
        for lane in lanes_of(active) {
            let at = block.barrier(space, lane, addresses[lane])?;
            let operands: Vec<u64> = operands.iter().map(|one| u64::from(one[lane] as u32)).collect();
            results[lane] =
                act(&mut block.barriers, at, &operands).map_err(|problem| format!("lane {lane}: {problem}"))?;
        }
        if let Some(to) = instruction.to.first() {
            self.write(*to, active, results);
        }
        Ok(())
    }

    /// Whether phases are over, lane by lane; false if that is to be asked again once something has changed.
    pub(crate) fn test_barriers(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        group: (usize, u32),
        active: u32,
        space: Space,
    ) -> Result<bool, String> {
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        let parity = self.read(block, instruction.from[2]);
        let mut over = [0; WARP];
        for lane in lanes_of(active) {
            if parity[lane] as u32 > 1 {
                return Err(format!("lane {lane}: {} is no parity", parity[lane] as u32));
            }
            let at = block.barrier(space, lane, addresses[lane])?;
            over[lane] = u64::from(block.is_over(at, parity[lane] & 1)?);
        }
        if lanes_where(|lane| over[lane] == 1) == 0 && self.waits.fails(block.barriers.changes, group) {
            return Ok(false);
        }
        self.write(instruction.to[0], active, over);
        Ok(true)
    }
}

/// `mbarrier.init`
pub(crate) fn make(barriers: &mut Barriers, at: u64, operands: &[u64]) -> Result<u64, String> {
    barriers.make(at, operands[0]).map(|()| 0)
}

/// `mbarrier.inval`
pub(crate) fn unmake(barriers: &mut Barriers, at: u64, _: &[u64]) -> Result<u64, String> {
    barriers.drop(at).map(|()| 0)
}

/// Of so many arrivals and so many bytes: `mbarrier.arrive`, `mbarrier.expect_tx` and both. The result is the phase.
pub(crate) fn arrive(barriers: &mut Barriers, at: u64, operands: &[u64]) -> Result<u64, String> {
    let phase = barriers.word(at)?.phase;
    barriers.change(at, operands[0], operands[1] as i64)?;
    Ok(phase)
}
