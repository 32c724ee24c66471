use super::{ListEntry, ListRows, SequenceLayout, TextPadding, TileVisit, VisitLists, WorkItem, WorkPairs, padding};
use std::collections::BTreeSet;
use std::fmt::Write;

/// Positions of a grid in the order of 8 x 8 patches.
pub(crate) fn patches(height: i32, width: i32) -> Vec<(i32, i32)> {
    let patch = |top: i32, left: i32| {
        (top..height.min(top + 8)).flat_map(move |row| (left..width.min(left + 8)).map(move |column| (row, column)))
    };
    let tops = (0..height).step_by(8);
    tops.flat_map(|top| (0..width).step_by(8).map(move |left| (top, left))).flat_map(|(t, l)| patch(t, l)).collect()
}

fn raster(height: i32, width: i32) -> Vec<(i32, i32)> {
    (0..height).flat_map(|row| (0..width).map(move |column| (row, column))).collect()
}

/// Whether a query attends to a key, by the definition of the window.
fn sees(sequence: &SequenceLayout<'_>, query: usize, key: usize) -> bool {
    let text = sequence.text.tokens();
    let end = sequence.text.tokens() + sequence.positions.len();
    match (query < text, key < text, key < end, sequence.limit) {
        (true, _, inside, _) => inside,
        (_, true, ..) | (_, _, false, _) | (_, _, _, None) => true,
        (_, _, _, Some(limit)) => {
            let (ay, ax) = sequence.positions[query - text];
            let (by, bx) = sequence.positions[key - text];
            (ay - by).pow(2) + (ax - bx).pow(2) < limit
        }
    }
}

/// The bit of (row, column) of a mask, in the order of the tensor cores.
fn bit(mask: &[u32], row: usize, column: usize) -> bool {
    let lane = row % 8 * 4 + column % 8 / 2;
    let thread = row / 16 * 32 + lane;
    mask[thread] >> (column / 8 * 4 + row % 16 / 8 * 2 + column % 2) & 1 == 1
}

fn seen(lists: &VisitLists, padded: &[u32], entry: &ListEntry, row: usize, column: usize) -> bool {
    match entry.mask {
        ListEntry::WHOLE => true,
        mask if mask >= 0 => bit(&lists.masks[mask as usize * 128..], row, column),
        mask => bit(&padded[(-2 - mask) as usize * 128..], row, column),
    }
}

/// How often each pair of a row and a column is computed.
fn pairs(lists: &VisitLists, padded: &[u32], extents: (usize, usize)) -> Vec<u8> {
    let mut found = vec![0; extents.0 * extents.1];
    for work in &lists.work {
        for entry in &lists.entries[work.begin as usize..work.end as usize] {
            assert!(entry.mask != ListEntry::WHOLE || entry.count == 64, "a whole entry has 64 columns");
            for (row, column) in (0..work.count as usize).flat_map(|row| (0..64).map(move |column| (row, column))) {
                if seen(lists, padded, entry, row, column) {
                    assert!(column < entry.count as usize, "a mask has bits past its columns");
                    found[(work.first as usize + row) * extents.1 + entry.first as usize + column] += 1;
                }
            }
        }
    }
    found
}

fn check(sequence: &SequenceLayout<'_>) {
    let queries = sequence.text.tokens() + sequence.positions.len();
    let keys = queries + sequence.pooled;
    let by_queries = pairs(&VisitLists::with_parts(sequence, ListRows::Queries, 2), &[], (queries, keys));
    let by_keys = pairs(&VisitLists::with_parts(sequence, ListRows::Keys, 3), &[], (keys, queries));
    for (query, key) in (0..queries).flat_map(|query| (0..keys).map(move |key| (query, key))) {
        let times = u8::from(sees(sequence, query, key));
        assert_eq!(by_queries[query * keys + key], times, "{query} {key} {sequence:?}");
        assert_eq!(by_keys[key * queries + query], times, "{key} {query} {sequence:?}");
    }
}

#[test]
fn each_pair_inside_the_window_is_computed_once_and_no_other() {
    for (height, width) in [(5, 8), (13, 7), (1, 40), (16, 16), (3, 70), (17, 9)] {
        let positions = patches(height, width);
        for (text, pooled) in [(0, 0), (7, 6), (70, 0)] {
            for limit in [Some(3), Some(9), Some(64), Some(1 << 29), None] {
                check(&SequenceLayout { text: TextPadding::Whole(text), positions: &positions, pooled, limit });
            }
            check(&SequenceLayout {
                text: TextPadding::Whole(text),
                positions: &raster(height, width),
                pooled,
                limit: Some(20),
            });
        }
    }
}

#[test]
fn grids_that_tiles_do_not_divide_are_covered() {
    for (height, width) in (1..=40).step_by(3).flat_map(|height| (1..=40).step_by(7).map(move |width| (height, width)))
    {
        let text = (height * 7 + width) as usize % 71;
        let limit = Some((height * width) % 130 + 1);
        check(&SequenceLayout { text: TextPadding::Whole(text), positions: &patches(height, width), pooled: 3, limit });
    }
}

#[test]
fn two_grids_follow_each_other() {
    let positions: Vec<_> = patches(9, 11).into_iter().chain(patches(6, 5)).collect();
    check(&SequenceLayout { text: TextPadding::Whole(5), positions: &positions, pooled: 0, limit: Some(16) });
}

#[test]
fn padded_text_is_hidden_as_keys_and_kept_as_queries() {
    let positions = patches(9, 13);
    let sequence = SequenceLayout { text: TextPadding::Padded(70), positions: &positions, pooled: 0, limit: Some(10) };
    let visible: Vec<bool> = (0..70).map(|token| token % 3 != 1 && token < 66).collect();
    let tables = [ListRows::Queries, ListRows::Keys].map(|rows| padding(std::slice::from_ref(&visible), rows));
    let tokens = 70 + positions.len();
    let found = pairs(&VisitLists::new(&sequence, ListRows::Queries), &tables[0], (tokens, tokens));
    for (query, key) in (0..tokens).flat_map(|query| (0..tokens).map(move |key| (query, key))) {
        let counts = sees(&sequence, query, key) && visible.get(key).copied().unwrap_or(true);
        assert_eq!(found[query * tokens + key], u8::from(counts), "{query} {key}");
    }
    let lists = VisitLists::new(&sequence, ListRows::Keys);
    let mut rows = BTreeSet::new();
    for work in lists.work.iter().filter(|work| work.first < 70) {
        for entry in &lists.entries[work.begin as usize..work.end as usize] {
            let is_seen = |key: &usize| seen(&lists, &tables[1], entry, *key - work.first as usize, 0);
            rows.extend((work.first as usize..(work.first + work.count) as usize).filter(is_seen));
        }
    }
    assert_eq!(rows, (0..70).filter(|key| visible[*key]).collect());
}

#[test]
fn splits_are_short_even_and_joined_in_order() {
    let positions = patches(64, 64);
    let sequence = SequenceLayout { text: TextPadding::Whole(512), positions: &positions, pooled: 0, limit: Some(64) };
    for rows in [ListRows::Queries, ListRows::Keys] {
        let lists = VisitLists::with_parts(&sequence, rows, 20);
        let parts: Vec<&WorkItem> = lists.work.iter().take_while(|work| work.slot >= 0).collect();
        assert_eq!((parts.len(), lists.slots, lists.joins.len()), (32, 32, 8));
        assert!(lists.work[32..].iter().all(|work| work.slot < 0 && work.end - work.begin <= 20));
        assert!(parts.iter().all(|part| part.end - part.begin == 18), "72 tiles in 4 splits");
        assert!(parts.iter().enumerate().all(|(slot, part)| part.slot == slot as i32));
        for (index, join) in lists.joins.iter().enumerate() {
            assert_eq!((join.first, join.begin, join.end), (index as i32 * 64, index as i32 * 4, index as i32 * 4 + 4));
        }
    }
}

#[test]
fn only_rows_longer_than_those_of_the_image_are_split() {
    let positions = patches(128, 128);
    let split = |text, limit, rows| {
        let lists = VisitLists::new(
            &SequenceLayout { text: TextPadding::Whole(text), positions: &positions, pooled: 0, limit },
            rows,
        );
        (lists.joins.len(), lists.slots)
    };
    for rows in [ListRows::Queries, ListRows::Keys] {
        assert_eq!(split(512, Some(64), rows), (8, 40), "264 tiles in 5 splits");
        assert_eq!(split(512, Some(1024), rows), (8, 32), "lists of the image have up to 85 entries");
        assert_eq!(split(512, None, rows), (0, 0));
        assert_eq!(split(0, Some(64), rows), (0, 0));
    }
}

/// Each half of a pair visits what its work item visits, and neither skips two visits of the other in a row.
#[test]
fn pairs_visit_what_their_work_items_visit() {
    for (height, width, text, pooled) in [(13, 7, 7, 0), (40, 24, 70, 6), (1, 140, 0, 0), (9, 40, 130, 3)] {
        let positions = patches(height, width);
        for (limit, longest) in [(Some(9), 2), (Some(100), 64), (None, 3)] {
            let sequence = SequenceLayout { text: TextPadding::Padded(text), positions: &positions, pooled, limit };
            let lists = VisitLists::with_parts(&sequence, ListRows::Queries, longest);
            let WorkPairs { pairs, visits } = WorkPairs::new(&lists);
            let mut found = BTreeSet::new();
            for (pair, which) in pairs.iter().flat_map(|pair| [(pair, 0), (pair, 1)]) {
                assert!(pair.begin < pair.end && pair.ends.iter().max() == Some(&pair.end), "{pair:?}");
                let own = &visits[pair.begin as usize..pair.ends[which] as usize];
                let seen: Vec<_> = own.iter().filter(|visit| visit.masks[which] != TileVisit::UNSEEN).collect();
                let gaps = own.windows(2).filter(|two| two.iter().all(|visit| visit.masks[which] == TileVisit::UNSEEN));
                assert_eq!(gaps.count(), 0, "{pair:?}");
                let visited: BTreeSet<_> = seen.iter().map(|visit| (visit.first, visit.masks[which])).collect();
                let Some(work) = usize::try_from(pair.works[which]).ok().map(|index| &lists.work[index]) else {
                    assert!(seen.is_empty());
                    continue;
                };
                assert!(found.insert(pair.works[which]) && visited.len() == seen.len());
                let entries = &lists.entries[work.begin as usize..work.end as usize];
                assert_eq!(visited, entries.iter().map(|entry| (entry.first, entry.mask)).collect());
            }
            assert_eq!(found.len(), lists.work.len());
        }
    }
}

#[test]
fn a_pair_loads_little_more_than_one_tile_does() {
    let positions = patches(128, 128);
    let sequence = SequenceLayout { text: TextPadding::Whole(512), positions: &positions, pooled: 0, limit: Some(256) };
    let lists = VisitLists::new(&sequence, ListRows::Queries);
    let pairs = WorkPairs::new(&lists).pairs;
    let loaded: i32 = pairs.iter().map(|pair| pair.end - pair.begin).sum();
    let seen: i32 = lists.work.iter().map(|work| work.end - work.begin).sum();
    assert_eq!((pairs.len() * 2, loaded * 100 / seen), (lists.work.len(), 55), "percent");
}

#[test]
fn rows_that_attend_to_everything_share_one_list() {
    let positions = patches(64, 64);
    let sequence = SequenceLayout { text: TextPadding::Whole(512), positions: &positions, pooled: 0, limit: None };
    let lists = VisitLists::new(&sequence, ListRows::Queries);
    assert_eq!((lists.work.len(), lists.entries.len(), lists.masks.len()), (72, 72, 0));
}

/// Percent of computed pairs inside the disc, tiles of 8 x 8, as published for CLEAR and computed by another program.
#[test]
fn efficiency_matches_the_published_table() {
    for (side, expected) in [(64, [36, 55, 75]), (128, [35, 52, 69]), (256, [34, 51, 67])] {
        for (radius, percent) in [8_i32, 16, 32].into_iter().zip(expected) {
            let positions = patches(side, side);
            let limit = Some(radius * radius);
            let efficiency = VisitLists::efficiency(&SequenceLayout {
                text: TextPadding::Whole(0),
                positions: &positions,
                pooled: 0,
                limit,
            });
            let found = (100.0 * efficiency.inside as f64 / efficiency.visited as f64).round() as i32;
            assert_eq!(found, percent, "{side} x {side}, radius {radius}: {efficiency}");
        }
    }
}

#[test]
fn masks_of_equal_neighbourhoods_are_stored_once() {
    let count = |side| {
        let positions = patches(side, side);
        let sequence =
            SequenceLayout { text: TextPadding::Whole(0), positions: &positions, pooled: 0, limit: Some(256) };
        VisitLists::new(&sequence, ListRows::Queries).masks.len() / 128
    };
    assert_eq!((count(64), count(256)), (24, 24));
}

/// The sequences and lists, by queries and by keys, over which checks/check.cpp runs the kernels.
fn printed() -> String {
    let mut out = String::new();
    for (height, width, text, pooled, limit) in [(13, 7, 7, 0, 9), (16, 16, 70, 6, 64), (1, 140, 0, 0, 400)] {
        let positions = patches(height, width);
        let sequence =
            SequenceLayout { text: TextPadding::Whole(text), positions: &positions, pooled, limit: Some(limit) };
        writeln!(out, "{height} {width} {text} {pooled} {limit}").unwrap();
        for rows in [ListRows::Queries, ListRows::Keys] {
            write!(out, "{}", VisitLists::with_parts(&sequence, rows, 2)).unwrap();
        }
    }
    out
}

#[test]
fn committed_lists_are_fresh() {
    let known = include_str!("../checks/lists.txt");
    assert!(
        printed() == known,
        "cargo test -p clearform-kernels -- --ignored writes them; then run simulator/check.sh"
    );
}

#[test]
#[ignore = "writes checks/lists.txt"]
fn write_committed_lists() {
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/checks/lists.txt"), printed()).unwrap();
}
