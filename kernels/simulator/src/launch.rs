//! [`launch`]: runs the blocks of a grid, one on each CPU core at a time.

use crate::barriers::Barriers;
use crate::instruction::WARP_SIZE;
use crate::memory::allocations;
use crate::program::Program;
use crate::schedule::Schedule;
use crate::warp::{Block, Warp, WarpStatus};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// The shape of a launch.
#[derive(Clone, Copy)]
pub struct Grid {
    /// Blocks along each axis.
    pub blocks: [u32; 3],
    /// Threads of a block along each axis.
    pub threads: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
}

impl Grid {
    fn warps(&self) -> usize {
        self.threads.iter().product::<u32>().div_ceil(WARP_SIZE as u32) as usize
    }

    fn block_count(&self) -> u64 {
        self.blocks.iter().map(|count| u64::from(*count)).product()
    }

    fn block_index(&self, number: u64) -> [u32; 3] {
        let [x, y, _] = self.blocks.map(u64::from);
        [number % x, number / x % y, number / (x * y)].map(|index| index as u32)
    }
}

/// Runs a grid to its end.
///
/// # Errors
/// The first fault, with its block.
pub fn launch(program: &Program, parameters: &[u8], grid: Grid, schedule: Schedule) -> Result<(), String> {
    let next = AtomicU64::new(0);
    let fault = Mutex::new(None);
    let allocations = allocations();
    let atomics = Mutex::new(());
    let count = grid.block_count();
    let work = || {
        let mut warps: Vec<Warp> = (0..grid.warps()).map(|number| Warp::new(program, number)).collect();
        let shared = vec![0; program.shared_bytes.next_multiple_of(16) + grid.shared_bytes];
        let mut block = Block {
            program,
            parameters,
            allocations: &allocations,
            atomics: &atomics,
            shared,
            barriers: Barriers::default(),
            threads: grid.threads,
            blocks: grid.blocks,
            index: [0; 3],
            schedule,
        };
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            block.index = grid.block_index(number);
            if let Err(text) = run_block(&mut block, &mut warps) {
                next.store(count, Ordering::Relaxed);
                if let Ok(mut fault) = fault.lock() {
                    fault.get_or_insert(format!("block {:?}: {text}", block.index));
                }
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    std::thread::scope(|scope| {
        for _ in 1..cores.min(count) {
            scope.spawn(work);
        }
        work();
    });
    fault.into_inner().ok().flatten().map_or(Ok(()), Err)
}

/// Runs each warp until it has to wait, in turn, until all have ended.
fn run_block(block: &mut Block, warps: &mut [Warp]) -> Result<(), String> {
    block.shared.fill(0xff); // NaN in every format
    block.barriers = Barriers::new(warps.len(), block.schedule.pedantic);
    warps.iter_mut().for_each(|warp| warp.begin(block));
    let last_warp_first = block.index[0].is_multiple_of(2) == block.schedule.reversed;
    loop {
        let events = block.barriers.events;
        let mut waiting = false;
        for at in 0..warps.len() {
            let at = if last_warp_first { warps.len() - 1 - at } else { at };
            waiting |= !warps[at].has_ended() && warps[at].run(block)? == WarpStatus::Waiting;
        }
        if !waiting {
            return check_end(block, warps);
        }
        if block.barriers.events == events {
            let running = warps.iter().filter(|warp| !warp.has_ended());
            let positions: Vec<String> = running.map(|warp| warp.position(block)).collect();
            return Err(format!("deadlock: {}{}", positions.join("; "), block.barriers));
        }
    }
}

/// Checks that nothing is pending, and that the four warps of each warpgroup issued the same `wgmma`s.
fn check_end(block: &Block, warps: &[Warp]) -> Result<(), String> {
    for group in warps.chunks(4) {
        let issued = group.iter().map(|warp| warp.wgmma.issued);
        let fewest = issued.clone().min().unwrap_or(0);
        let most = issued.max().unwrap_or(0);
        if fewest != most || group.len() < 4 && most != 0 {
            return Err(format!("the {} warps of a warpgroup issued {fewest} to {most} wgmmas", group.len()));
        }
    }
    block.barriers.check_end()
}
