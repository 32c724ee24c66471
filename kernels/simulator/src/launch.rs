//! [`launch`]: all blocks of a grid, as many at a time as there are cores.

use crate::barriers::Barriers;
use crate::instruction::WARP;
use crate::memory::allocations;
use crate::program::Program;
use crate::warp::{Block, Stop, Warp};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs a grid to its end.
///
/// # Errors
/// What went wrong first, with the block.
pub fn launch(
    program: &Program,
    parameters: &[u8],
    blocks: [u32; 3],
    threads: [u32; 3],
    shared_bytes: usize,
) -> Result<(), String> {
    let (next, problem) = (AtomicU64::new(0), Mutex::new(None));
    let (allocations, atomics) = (allocations(), Mutex::new(()));
    let count: u64 = blocks.iter().map(|one| u64::from(*one)).product();
    let work = || {
        let warps = threads.iter().product::<u32>().div_ceil(WARP as u32) as usize;
        let mut warps: Vec<Warp> = (0..warps).map(|number| Warp::new(program, number)).collect();
        let shared = vec![0; program.shared_bytes.next_multiple_of(16) + shared_bytes];
        let (index, atomics, barriers) = ([0; 3], &atomics, Barriers::default());
        let mut block =
            Block { program, parameters, allocations: &allocations, atomics, shared, barriers, threads, blocks, index };
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return;
            }
            let [x, y, _] = blocks.map(u64::from);
            block.index = [at % x, at / x % y, at / (x * y)].map(|one| one as u32);
            if let Err(found) = run(&mut block, &mut warps) {
                next.store(count, Ordering::Relaxed);
                if let Ok(mut problem) = problem.lock() {
                    problem.get_or_insert(format!("block {:?}: {found}", block.index));
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
    problem.into_inner().ok().flatten().map_or(Ok(()), Err)
}

/// Warps run until they wait; every other block has its last warp first, for orders that must not matter.
fn run(block: &mut Block, warps: &mut [Warp]) -> Result<(), String> {
    block.shared.fill(0xff); // no numbers, in every format
    block.barriers = Barriers::new(warps.len());
    warps.iter_mut().for_each(|warp| warp.begin(block));
    loop {
        let (mut waiting, before) = (false, block.barriers.changes);
        for at in 0..warps.len() {
            let at = if block.index[0].is_multiple_of(2) { at } else { warps.len() - 1 - at };
            waiting |= !warps[at].ended() && warps[at].run(block)? == Stop::Wait;
        }
        if !waiting {
            return end(block, warps);
        }
        if block.barriers.changes == before {
            let waiting = warps.iter().filter(|warp| !warp.ended()).map(|warp| warp.place_of(block));
            let waiting = waiting.collect::<Vec<_>>().join("; ");
            return Err(format!("all warps wait for each other: {waiting}{}", block.barriers));
        }
    }
}

/// Whether nothing is left under way, and the four warps of each warpgroup multiplied together.
fn end(block: &Block, warps: &[Warp]) -> Result<(), String> {
    for group in warps.chunks(4) {
        let products = group.iter().map(|warp| warp.products.begun);
        let (least, most) = (products.clone().min(), products.max());
        if least != most || group.len() < 4 && most != Some(0) {
            return Err(format!("warps of a warpgroup began {least:?} and {most:?} products of {}", group.len()));
        }
    }
    block.barriers.end()
}
