//! [`VisitLists`]: which tiles of 64 rows visit which tiles of 64 columns. Computed once per geometry and radius, and
//! shared by all layers and steps.

use super::layout::{ListEntry, ListRows, SequenceLayout, TextPadding, WorkItem};
use super::masks::{Masks, TileOverlap};
use super::tiles::{TILE_TOKENS, TokenTile, image_tiles, near, tiles_without_positions};
use std::fmt;
use std::ops::Range;

/// The work of one launch, and the tiles it visits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisitLists {
    /// One item per thread block. Splits of long lists come first, so that the longest work does not start last.
    pub work: Vec<WorkItem>,
    /// Rows whose partial results are merged afterwards.
    pub joins: Vec<WorkItem>,
    /// Tiles of columns that the work visits.
    pub entries: Vec<ListEntry>,
    /// Masks of 128 words, one per thread, in the layout that `common.cuh` describes.
    pub masks: Vec<u32>,
    /// Number of partial results.
    pub slots: usize,
}

impl VisitLists {
    /// The lists of `sequence`. Lists that are longer than any of the image's are split, as in Flash-Decoding, so that
    /// the GPU does not wait for a few long rows of text.
    pub fn new(sequence: &SequenceLayout<'_>, rows: ListRows) -> Self {
        // Up to 64 tiles, 4096 columns, no list is split: writing and merging partial results would cost more than it
        // saves.
        const SHORT: usize = 64;
        // At most 16 splits: the memory of partial results grows with them, and `merge` reads all of a row in order.
        const PARTS: usize = 16;
        let builder = ListBuilder::new(sequence, rows);
        let tiles = builder.text.len() + builder.image.len();
        builder.build(|image| image.max(SHORT).max(tiles.div_ceil(PARTS)))
    }

    /// The same with splits of at most `longest` entries; the splits of a list have nearly the same length.
    pub fn with_parts(sequence: &SequenceLayout<'_>, rows: ListRows, longest: usize) -> Self {
        ListBuilder::new(sequence, rows).build(|_| longest.max(1))
    }

    /// Pairs that are computed, the empty rows and columns of ragged tiles included.
    pub fn visited(&self) -> u64 {
        let entries: u64 = self.work.iter().map(|work| (work.end - work.begin) as u64).sum();
        entries * (TILE_TOKENS * TILE_TOKENS) as u64
    }

    /// Pairs of image tokens that attend to each other, among all that are computed between image tokens.
    pub fn efficiency(sequence: &SequenceLayout<'_>) -> PairEfficiency {
        let image = SequenceLayout { text: TextPadding::Whole(0), pooled: 0, ..*sequence };
        let lists = Self::new(&image, ListRows::Queries);
        let mut efficiency = PairEfficiency { inside: 0, visited: lists.visited() };
        for work in &lists.work {
            for entry in &lists.entries[work.begin as usize..work.end as usize] {
                efficiency.inside += match entry.mask {
                    ListEntry::WHOLE => work.count as u64 * TILE_TOKENS as u64,
                    mask => Masks::pairs(&lists.masks, mask as usize),
                };
            }
        }
        efficiency
    }
}

/// Pairs inside the window, among all that a kernel computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairEfficiency {
    /// Pairs of a query and a key that it attends to.
    pub inside: u64,
    /// Pairs that are computed.
    pub visited: u64,
}

impl fmt::Display for PairEfficiency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = 100.0 * self.inside as f64 / self.visited as f64;
        write!(f, "{} of {} computed pairs lie inside the disc ({percent:.0}%)", self.inside, self.visited)
    }
}

impl fmt::Display for VisitLists {
    /// As numbers for the C++ checks: counts, then each table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.slots, self.work.len())?;
        self.work.iter().try_for_each(|work| write_item(f, work))?;
        writeln!(f, "{}", self.joins.len())?;
        self.joins.iter().try_for_each(|work| write_item(f, work))?;
        writeln!(f, "{}", self.entries.len())?;
        self.entries.iter().try_for_each(|entry| writeln!(f, "{} {} {}", entry.first, entry.count, entry.mask))?;
        writeln!(f, "{}", self.masks.len())?;
        self.masks.chunks(16).try_for_each(|words| {
            words.iter().try_for_each(|word| write!(f, "{word} "))?;
            writeln!(f)
        })
    }
}

fn write_item(f: &mut fmt::Formatter<'_>, work: &WorkItem) -> fmt::Result {
    writeln!(f, "{} {} {} {} {}", work.first, work.count, work.begin, work.end, work.slot)
}

/// The part of the sequence that a tile belongs to, and its index there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SequencePart {
    Text(usize),
    Image(usize),
    Pooled,
}

/// Parts of the sequence that a row attends to regardless of distance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FullColumns {
    text: bool,
    image: bool,
    pooled: bool,
    /// The text tile of the row, whose padding masks all its columns.
    padding: Option<usize>,
}

struct ListBuilder<'a> {
    rows: ListRows,
    padded: bool,
    limit: Option<i32>,
    text: Vec<TokenTile>,
    image: Vec<TokenTile>,
    pooled: Vec<TokenTile>,
    masks: Masks<'a>,
    entries: Vec<ListEntry>,
    /// Runs of entries that all rows of a kind share.
    shared: Vec<(FullColumns, Range<usize>)>,
}

impl<'a> ListBuilder<'a> {
    fn new(sequence: &SequenceLayout<'a>, rows: ListRows) -> Self {
        let text = sequence.text.tokens();
        let image = sequence.positions.len();
        Self {
            rows,
            padded: matches!(sequence.text, TextPadding::Padded(_)),
            limit: sequence.limit,
            text: tiles_without_positions(0..text),
            image: image_tiles(sequence.positions, text),
            pooled: tiles_without_positions(text + image..text + image + sequence.pooled),
            masks: Masks::new(sequence.positions, text),
            entries: Vec::new(),
            shared: Vec::new(),
        }
    }

    /// `longest` returns the most entries of a split, given the length of the image's longest list.
    fn build(mut self, longest: impl Fn(usize) -> usize) -> VisitLists {
        let mut runs = Vec::new();
        let mut longest_of_image = 0;
        for (part, tile) in self.row_tiles() {
            let run = match (part, self.limit) {
                (SequencePart::Image(index), Some(limit)) => self.window_run(index, limit),
                _ => self.full_run(part),
            };
            longest_of_image = longest_of_image.max(if matches!(part, SequencePart::Image(_)) { run.len() } else { 0 });
            runs.push((tile, run));
        }
        let longest = longest(longest_of_image);
        let mut lists = VisitLists {
            work: Vec::new(),
            joins: Vec::new(),
            entries: self.entries,
            masks: self.masks.words,
            slots: 0,
        };
        for (tile, run) in runs.into_iter().filter(|(_, run)| !run.is_empty()) {
            lists.add_work(&tile, run, longest);
        }
        lists.work.sort_by_key(|work| work.slot < 0);
        lists
    }

    /// Tiles of rows of the launch; pooled context has no queries.
    fn row_tiles(&self) -> Vec<(SequencePart, TokenTile)> {
        let text = self.text.iter().enumerate().map(|(index, tile)| (SequencePart::Text(index), tile.clone()));
        let image = self.image.iter().enumerate().map(|(index, tile)| (SequencePart::Image(index), tile.clone()));
        let pooled =
            self.pooled.iter().filter(|_| self.rows == ListRows::Keys).map(|tile| (SequencePart::Pooled, tile.clone()));
        text.chain(image).chain(pooled).collect()
    }

    /// The entries of a row that attends regardless of distance.
    fn full_run(&mut self, part: SequencePart) -> Range<usize> {
        let queries = self.rows == ListRows::Queries;
        let columns = FullColumns {
            text: part != SequencePart::Pooled,
            image: true,
            pooled: queries && matches!(part, SequencePart::Image(_)) && !self.pooled.is_empty(),
            padding: match part {
                SequencePart::Text(index) if self.padded && !queries => Some(index),
                _ => None,
            },
        };
        self.shared_run(columns)
    }

    /// The entries of a kind of row, which are added once.
    fn shared_run(&mut self, columns: FullColumns) -> Range<usize> {
        if let Some((_, run)) = self.shared.iter().find(|(known, _)| *known == columns) {
            return run.clone();
        }
        let begin = self.entries.len();
        self.add_unmasked(columns);
        self.shared.push((columns, begin..self.entries.len()));
        begin..self.entries.len()
    }

    /// The entries of image tile `index`: text, the image around it, and pooled context.
    fn window_run(&mut self, index: usize, limit: i32) -> Range<usize> {
        let begin = self.entries.len();
        let pooled = self.rows == ListRows::Queries;
        self.add_unmasked(FullColumns { text: true, image: false, pooled: false, padding: None });
        for column in near(&self.image, index, limit) {
            let tile = &self.image[column];
            let mask = match self.masks.overlap(&self.image[index], tile, limit) {
                TileOverlap::Apart => continue,
                TileOverlap::Whole => ListEntry::WHOLE,
                TileOverlap::Masked(mask) => mask,
            };
            self.entries.push(ListEntry { first: tile.tokens.start as i32, count: tile.tokens.len() as i32, mask });
        }
        self.add_unmasked(FullColumns { text: false, image: false, pooled, padding: None });
        begin..self.entries.len()
    }

    /// Adds whole parts of the sequence, masked only where tiles are ragged or text is padded.
    fn add_unmasked(&mut self, columns: FullColumns) {
        let padded_columns = self.padded && self.rows == ListRows::Queries;
        let parts = [(columns.text, &self.text), (columns.image, &self.image), (columns.pooled, &self.pooled)];
        for (part, (_, tiles)) in parts.iter().enumerate().filter(|(_, (seen, _))| *seen) {
            for (index, tile) in tiles.iter().enumerate() {
                let text_tile = if part == 0 && padded_columns { Some(index) } else { columns.padding };
                let mask = match text_tile {
                    Some(text_tile) => -2 - text_tile as i32,
                    None => self.masks.first_columns(tile.tokens.len()),
                };
                self.entries.push(ListEntry { first: tile.tokens.start as i32, count: tile.tokens.len() as i32, mask });
            }
        }
    }
}

impl VisitLists {
    /// Adds the work of a row tile, in splits of at most `longest` entries.
    fn add_work(&mut self, tile: &TokenTile, run: Range<usize>, longest: usize) {
        let first = tile.tokens.start as i32;
        let count = tile.tokens.len() as i32;
        let parts = run.len().div_ceil(longest);
        let first_slot = self.slots as i32;
        for part in 0..parts {
            let edge = |part: usize| (run.start + run.len() * part / parts) as i32;
            let slot = if parts > 1 { first_slot + part as i32 } else { -1 };
            self.work.push(WorkItem { first, count, begin: edge(part), end: edge(part + 1), slot });
        }
        if parts > 1 {
            self.slots += parts;
            self.joins.push(WorkItem { first, count, begin: first_slot, end: self.slots as i32, slot: -1 });
        }
    }
}
