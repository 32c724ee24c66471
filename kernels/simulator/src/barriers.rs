//! [`Barriers`]: the barriers of a block, those of threads (`bar.sync`) and those in shared memory (`mbarrier`).

use crate::instruction::WARP_SIZE;
use crate::tensor_map::BulkCopy;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::{Display, Formatter};

/// The most arrivals or bytes that an mbarrier can count.
const MAX_COUNT: u64 = (1 << 20) - 1;

/// The barriers of a block, and its bulk copies, which complete at them.
#[derive(Default)]
pub struct Barriers {
    /// How many events happened that a warp may be waiting for.
    pub events: u64,
    /// How many mbarrier phases have completed.
    pub phases: u64,
    running_warps: usize,
    ended_warps: usize,
    /// Whether a warp that ended counts as missing at a barrier of the whole block.
    pedantic: bool,
    thread_barriers: [ThreadBarrier; 16],
    /// By offset in shared memory.
    mbarriers: BTreeMap<u64, MBarrier>,
    /// Pending bulk copies, oldest first.
    copies: VecDeque<BulkCopy>,
}

#[derive(Clone, Copy, Default)]
struct ThreadBarrier {
    arrived: u64,
    /// Threads to wait for; none for all that have not exited.
    wanted: Option<u64>,
    /// How many times it completed.
    completions: u64,
}

struct MBarrier {
    /// Arrivals that a phase takes.
    count: u64,
    /// Arrivals that the current phase still takes.
    missing: u64,
    /// Bytes that the current phase still waits for; negative if they came before they were expected.
    pending_bytes: i64,
    phase: u64,
}

/// A thread barrier's number, and how many times it had completed when the warp arrived.
#[derive(Clone, Copy)]
pub struct Arrival {
    number: usize,
    completions: u64,
}

impl MBarrier {
    /// Counts arrivals and bytes; returns whether that completes the phase.
    fn update(&mut self, arrivals: u64, bytes: i64) -> Result<bool, String> {
        self.pending_bytes += bytes;
        if self.pending_bytes.unsigned_abs() > MAX_COUNT {
            return Err(format!("{} pending bytes are more than an mbarrier can count", self.pending_bytes));
        }
        if arrivals > self.missing {
            return Err(format!("{arrivals} arrivals, but phase {} expects only {}", self.phase, self.missing));
        }
        self.missing -= arrivals;
        let completes = self.missing == 0 && self.pending_bytes == 0;
        if completes {
            self.phase += 1;
            self.missing = self.count;
        }
        Ok(completes)
    }
}

impl Display for Barriers {
    fn fmt(&self, out: &mut Formatter) -> std::fmt::Result {
        for (at, barrier) in &self.mbarriers {
            let MBarrier { missing, pending_bytes, phase, .. } = barrier;
            write!(out, "; mbarrier {at:#x} in phase {phase} lacks {missing} arrivals and {pending_bytes} bytes")?;
        }
        Ok(())
    }
}

impl Barriers {
    /// The barriers of a block of this many warps.
    pub fn new(warps: usize, pedantic: bool) -> Self {
        Self { running_warps: warps, pedantic, ..Self::default() }
    }

    /// A warp arrives at a thread barrier.
    ///
    /// # Errors
    /// The barrier does not exist, or other warps use it for another number of threads.
    pub fn arrive_at_thread_barrier(&mut self, number: u64, wanted: Option<u64>) -> Result<Arrival, String> {
        let barrier = self.thread_barriers.get_mut(number as usize);
        let barrier = barrier.ok_or_else(|| format!("there is no barrier {number}"))?;
        if wanted.is_some_and(|count| count == 0 || !count.is_multiple_of(WARP_SIZE as u64)) {
            return Err("the number of threads is not a multiple of the warp size".to_owned());
        }
        if barrier.arrived > 0 && barrier.wanted != wanted {
            let others = barrier.wanted.map_or("all".to_owned(), |count| count.to_string());
            return Err(format!("other warps wait there for {others} threads"));
        }
        barrier.wanted = wanted;
        barrier.arrived += WARP_SIZE as u64;
        let arrival = Arrival { number: number as usize, completions: barrier.completions };
        self.require_all_warps()?;
        self.complete_thread_barriers();
        Ok(arrival)
    }

    /// In pedantic mode, no warp may have ended that a barrier of the whole block should have waited for.
    fn require_all_warps(&self) -> Result<(), String> {
        let waits_for_all = self.thread_barriers.iter().any(|barrier| barrier.arrived > 0 && barrier.wanted.is_none());
        if self.pedantic && waits_for_all && self.ended_warps > 0 {
            return Err(format!("{} warps ended without reaching a barrier of all threads", self.ended_warps));
        }
        Ok(())
    }

    fn complete_thread_barriers(&mut self) {
        self.events += 1;
        let running_threads = (self.running_warps * WARP_SIZE) as u64;
        for barrier in self.thread_barriers.iter_mut().filter(|barrier| barrier.arrived > 0) {
            if barrier.arrived >= barrier.wanted.unwrap_or(running_threads) {
                barrier.arrived = 0;
                barrier.completions += 1;
            }
        }
    }

    /// Whether a thread barrier has completed since this arrival.
    pub fn has_completed(&self, arrival: Arrival) -> bool {
        self.thread_barriers[arrival.number].completions != arrival.completions
    }

    /// A warp has ended; barriers no longer wait for it.
    ///
    /// # Errors
    /// In pedantic mode, if others wait for it at a barrier.
    pub fn end_warp(&mut self) -> Result<(), String> {
        self.running_warps -= 1;
        self.ended_warps += 1;
        self.require_all_warps()?;
        self.complete_thread_barriers();
        Ok(())
    }

    /// Checks a block that has ended.
    ///
    /// # Errors
    /// A bulk copy is still pending.
    pub fn check_end(&self) -> Result<(), String> {
        self.copies.front().map_or(Ok(()), |copy| Err(format!("`{}` is still pending when the block ends", copy.text)))
    }

    /// `mbarrier.init`
    ///
    /// # Errors
    /// The count is out of range, or the word is an mbarrier already.
    pub fn init(&mut self, at: u64, count: u64) -> Result<(), String> {
        if count == 0 || count > MAX_COUNT {
            return Err(format!("an mbarrier cannot wait for {count} arrivals"));
        }
        self.events += 1;
        let barrier = MBarrier { count, missing: count, pending_bytes: 0, phase: 0 };
        self.mbarriers.insert(at, barrier).map_or(Ok(()), |_| Err(format!("{at:#x} is an mbarrier already")))
    }

    /// `mbarrier.inval`
    ///
    /// # Errors
    /// The word is not an mbarrier, or copies are pending at it.
    pub fn invalidate(&mut self, at: u64) -> Result<(), String> {
        self.find_mut(at)?;
        self.mbarriers.remove(&at);
        let pending = self.copies.iter().any(|copy| copy.barrier == at);
        if pending { Err("bulk copies to it are pending".to_owned()) } else { Ok(()) }
    }

    /// `mbarrier.arrive` and `mbarrier.expect_tx`; a negative number of bytes has arrived. Returns the phase before.
    ///
    /// # Errors
    /// The word is not an mbarrier, or more arrives than it waits for.
    pub fn update(&mut self, at: u64, arrivals: u64, bytes: i64) -> Result<u64, String> {
        self.events += 1;
        let barrier = self.find_mut(at)?;
        let phase = barrier.phase;
        let completes = barrier.update(arrivals, bytes)?;
        self.phases += u64::from(completes);
        Ok(phase)
    }

    /// Whether the phase of this parity has completed.
    ///
    /// # Errors
    /// The word is not an mbarrier.
    pub fn is_phase_complete(&mut self, at: u64, parity: u64) -> Result<bool, String> {
        Ok(self.find_mut(at)?.phase & 1 != parity)
    }

    /// Takes the oldest copy that completes at this mbarrier, if the phase lacks nothing but bytes: copies land as late as
    /// possible.
    ///
    /// # Errors
    /// The word is not an mbarrier.
    pub fn take_due_copy(&mut self, at: u64) -> Result<Option<BulkCopy>, String> {
        if self.find_mut(at)?.missing > 0 {
            return Ok(None);
        }
        let position = self.copies.iter().position(|copy| copy.barrier == at);
        Ok(position.and_then(|position| self.copies.remove(position)))
    }

    /// Adds a pending bulk copy.
    ///
    /// # Errors
    /// Its word is not an mbarrier, or another copy to the same place is pending.
    pub fn begin_copy(&mut self, copy: BulkCopy) -> Result<(), String> {
        self.find_mut(copy.barrier)?;
        let place = copy.destination();
        let overlaps = |other: &&BulkCopy| {
            let other = other.destination();
            place.start < other.end && other.start < place.end
        };
        if let Some(other) = self.copies.iter().find(overlaps) {
            return Err(format!("`{}` to the same place is pending", other.text));
        }
        self.copies.push_back(copy);
        Ok(())
    }

    fn find_mut(&mut self, at: u64) -> Result<&mut MBarrier, String> {
        self.mbarriers.get_mut(&at).ok_or_else(|| format!("{at:#x} is not an mbarrier"))
    }
}
