//! [`WorkPairs`]: pairs of query tiles for the forward on compute capability 9.0, which loads a tile of keys once for
//! both.

use super::layout::ListEntry;
use super::lists::VisitLists;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Two work items of [`VisitLists`], and their visits `[begin, end)`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkPair {
    /// Their indices; -1 where there is no second one.
    pub works: [i32; 2],
    /// First visit.
    pub begin: i32,
    /// One past the last visit.
    pub end: i32,
    /// One past the last visit of each.
    pub ends: [i32; 2],
}

/// A visit to the tile of columns from `first` on.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileVisit {
    /// First column.
    pub first: i32,
    /// [`ListEntry::mask`] for each of the two items, or [`TileVisit::UNSEEN`].
    pub masks: [i32; 2],
}

impl TileVisit {
    /// Only the other item visits this tile.
    pub const UNSEEN: i32 = i32::MAX;
}

/// All work items of some lists in pairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkPairs {
    /// Pairs with splits of long lists come first.
    pub pairs: Vec<WorkPair>,
    /// Visits of the pairs. Before its own last visit, neither item skips more than one visit of the other in a row:
    /// the ring of tiles in shared memory, which has six stages, could otherwise deadlock.
    pub visits: Vec<TileVisit>,
}

/// The visits of a pair, and the end of those of each item.
type VisitRuns = (Range<i32>, [i32; 2]);

impl WorkPairs {
    /// The pairs of `lists`.
    pub fn new(lists: &VisitLists) -> Self {
        let mut pairs = Self { pairs: Vec::new(), visits: Vec::new() };
        let mut known = HashMap::new();
        let entries = |index: &usize| {
            let work = &lists.work[*index];
            work.begin as usize..work.end as usize
        };
        // Sorted by entries, items with the same list become neighbours, and neighbouring tiles of the image visit
        // nearly the same tiles.
        let mut order: Vec<usize> = (0..lists.work.len()).collect();
        order.sort_by_key(|index| lists.work[*index].begin);
        for two in order.chunks(2) {
            let ranges = (entries(&two[0]), two.get(1).map_or(0..0, entries));
            let (run, ends) = known.entry(ranges).or_insert_with_key(|(first, second)| {
                pairs.add_run(&lists.entries[first.clone()], &lists.entries[second.clone()])
            });
            let works = [two[0] as i32, two.get(1).map_or(-1, |second| *second as i32)];
            pairs.pairs.push(WorkPair { works, begin: run.start, end: run.end, ends: *ends });
        }
        pairs
    }

    /// Adds the visits of both items first, then those of one item alone, alternating.
    fn add_run(&mut self, first: &[ListEntry], second: &[ListEntry]) -> VisitRuns {
        let masks = [first, second]
            .map(|entries| -> BTreeMap<i32, i32> { entries.iter().map(|entry| (entry.first, entry.mask)).collect() });
        let mask_of = |which: usize, first: i32| masks[which].get(&first).copied().unwrap_or(TileVisit::UNSEEN);
        let visit = |first: &i32| TileVisit { first: *first, masks: [0, 1].map(|which| mask_of(which, *first)) };
        let [alone, others] = [0, 1].map(|which| {
            let alone = masks[which].keys().filter(move |first| mask_of(1 - which, **first) == TileVisit::UNSEEN);
            alone.map(visit).collect::<Vec<_>>()
        });
        let begin = self.visits.len();
        self.visits.extend(masks[0].keys().map(visit).filter(|visit| visit.masks[1] != TileVisit::UNSEEN));
        for turn in 0..alone.len().max(others.len()) {
            self.visits.extend(alone.get(turn).into_iter().chain(others.get(turn)));
        }
        let ends = [0, 1].map(|which| {
            let last = self.visits[begin..].iter().rposition(|visit| visit.masks[which] != TileVisit::UNSEEN);
            (begin + last.map_or(0, |last| last + 1)) as i32
        });
        (begin as i32..self.visits.len() as i32, ends)
    }
}
