//! [`WorkPairs`]: tiles of queries two by two, as the forward for compute capability 9.0 reads them, so that what both meet is
//! loaded once. Knows no device and no tensor.

use super::lists::{ListEntry, VisitLists};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Two works of [`VisitLists`], and what they visit: `[begin, end)`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkPair {
    /// Their numbers; -1 where there is no second one.
    pub works: [i32; 2],
    /// First visit.
    pub begin: i32,
    /// Behind the last visit.
    pub end: i32,
    /// Behind the last visit of each.
    pub own: [i32; 2],
}

/// A tile of columns from `first` on.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileVisit {
    /// First column.
    pub first: i32,
    /// What each of the two sees of it: [`ListEntry::mask`], or [`TileVisit::UNSEEN`].
    pub masks: [i32; 2],
}

impl TileVisit {
    /// Only the other one meets this tile.
    pub const UNSEEN: i32 = i32::MAX;
}

/// All works of some lists in pairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkPairs {
    /// Parts of long lists first.
    pub pairs: Vec<WorkPair>,
    /// What they visit. Before its last one, none of two works passes more than one visit of the other.
    pub visits: Vec<TileVisit>,
}

/// Visits of a pair, from where to where, and where those of each end.
type VisitRuns = (Range<i32>, [i32; 2]);

impl WorkPairs {
    /// Those of `lists`.
    pub fn new(lists: &VisitLists) -> Self {
        let mut pairs = Self { pairs: Vec::new(), visits: Vec::new() };
        let mut known = HashMap::new();
        let entries = |number: &usize| {
            let work = &lists.work[*number];
            work.begin as usize..work.end as usize
        };
        // Works with the same entries become neighbours; those that are neighbours meet much the same.
        let mut order: Vec<usize> = (0..lists.work.len()).collect();
        order.sort_by_key(|number| lists.work[*number].begin);
        for two in order.chunks(2) {
            let ranges = (entries(&two[0]), two.get(1).map_or(0..0, entries));
            let (run, own) = known.entry(ranges).or_insert_with_key(|(first, second)| {
                pairs.add_run(&lists.entries[first.clone()], &lists.entries[second.clone()])
            });
            let works = [two[0] as i32, two.get(1).map_or(-1, |second| *second as i32)];
            pairs.pairs.push(WorkPair { works, begin: run.start, end: run.end, own: *own });
        }
        pairs
    }

    /// What both visit first, then in turn what one of them visits alone.
    fn add_run(&mut self, first: &[ListEntry], second: &[ListEntry]) -> VisitRuns {
        let masks = [first, second]
            .map(|entries| -> BTreeMap<i32, i32> { entries.iter().map(|entry| (entry.first, entry.mask)).collect() });
        let seen = |which: usize, first: i32| masks[which].get(&first).copied().unwrap_or(TileVisit::UNSEEN);
        let visit = |first: &i32| TileVisit { first: *first, masks: [0, 1].map(|which| seen(which, *first)) };
        let [alone, others] = [0, 1].map(|which| {
            let alone = masks[which].keys().filter(move |first| seen(1 - which, **first) == TileVisit::UNSEEN);
            alone.map(visit).collect::<Vec<_>>()
        });
        let begin = self.visits.len();
        self.visits.extend(masks[0].keys().map(visit).filter(|visit| visit.masks[1] != TileVisit::UNSEEN));
        for turn in 0..alone.len().max(others.len()) {
            self.visits.extend(alone.get(turn).into_iter().chain(others.get(turn)));
        }
        let own = [0, 1].map(|which| {
            let last = self.visits[begin..].iter().rposition(|visit| visit.masks[which] != TileVisit::UNSEEN);
            (begin + last.map_or(0, |last| last + 1)) as i32
        });
        (begin as i32..self.visits.len() as i32, own)
    }
}
