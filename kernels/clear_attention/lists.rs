//! [`VisitLists`]: which tiles of 64 tokens meet, as the kernels read it: data, computed once per geometry and radius and
//! shared by all layers and steps. Knows no device and no tensor.

use super::masks::{Masks, TileOverlap};
use super::tiles::{TokenTile, chop, image_tiles, near};
use std::fmt;
use std::ops::Range;

/// Rows that one block computes: `[first, first + count)` against entries `[begin, end)`. With `slot >= 0` the result is
/// a part. In a join, `[begin, end)` are the slots to bring together.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkItem {
    /// First row.
    pub first: i32,
    /// Rows, at most 64.
    pub count: i32,
    /// First entry.
    pub begin: i32,
    /// Behind the last entry.
    pub end: i32,
    /// Where the part goes, or -1.
    pub slot: i32,
}

/// Columns that are visited: `[first, first + count)`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListEntry {
    /// First column.
    pub first: i32,
    /// Columns, at most 64.
    pub count: i32,
    /// [`ListEntry::WHOLE`], the number of a mask, or -2 - i for the mask of text tile i of a batch entry ([`padding`]).
    ///
    /// [`padding`]: super::padding
    pub mask: i32,
}

impl ListEntry {
    /// Each row sees each of 64 columns.
    pub const WHOLE: i32 = -1;
}

/// What a list's rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListRows {
    /// Queries, which visit keys: forward and the gradient of the queries.
    Queries,
    /// Keys, which visit queries: the gradients of keys and values.
    Keys,
}

/// Text that may be padded, batch entry by batch entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextPadding {
    /// All tokens count.
    Whole(usize),
    /// Which count stands in the padding of the call.
    Padded(usize),
}

impl TextPadding {
    /// Tokens, padding included.
    pub fn tokens(self) -> usize {
        let (Self::Whole(tokens) | Self::Padded(tokens)) = self;
        tokens
    }
}

/// The tokens of a call, [text, image, pooled], and how far image tokens see each other.
#[derive(Debug, Clone, Copy)]
pub struct SequenceLayout<'a> {
    /// Text tokens, which see all but pooled context and are seen by all.
    pub text: TextPadding,
    /// Row and column of each image token, in the order of the sequence.
    pub places: &'a [(i32, i32)],
    /// Keys of pooled context, which image tokens see.
    pub pooled: usize,
    /// Image tokens see each other where their squared distance is below it; none: everywhere.
    pub limit: Option<i32>,
}

/// The work of one launch and what it visits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisitLists {
    /// A block each, parts of long lists first.
    pub work: Vec<WorkItem>,
    /// Rows whose parts are to be brought together.
    pub joins: Vec<WorkItem>,
    /// What they visit.
    pub entries: Vec<ListEntry>,
    /// 128 words each: a word per thread, as `common.cuh` describes it.
    pub masks: Vec<u32>,
    /// Parts.
    pub slots: usize,
}

impl VisitLists {
    /// The lists of `sequence`. Those that are longer than any of the image's are split, so that a few long rows do not
    /// idle the chip, into at most 16 parts.
    pub fn new(sequence: &SequenceLayout<'_>, rows: ListRows) -> Self {
        const SHORT: usize = 64;
        const PARTS: usize = 16;
        let builder = ListBuilder::new(sequence, rows);
        let tiles = builder.text.len() + builder.image.len();
        builder.build(|image| image.max(SHORT).max(tiles.div_ceil(PARTS)))
    }

    /// The same with parts of at most `longest` entries, in each list of nearly the same length.
    pub fn with_parts(sequence: &SequenceLayout<'_>, rows: ListRows, longest: usize) -> Self {
        ListBuilder::new(sequence, rows).build(|_| longest.max(1))
    }

    /// Pairs that are computed, empty rows and columns of ragged tiles included.
    pub fn visited(&self) -> u64 {
        let entries: u64 = self.work.iter().map(|work| (work.end - work.begin) as u64).sum();
        entries * (TOKENS * TOKENS) as u64
    }

    /// Pairs of image tokens that see each other, among all that are computed for the image alone.
    pub fn share_inside(sequence: &SequenceLayout<'_>) -> PairEfficiency {
        let image = SequenceLayout { text: TextPadding::Whole(0), pooled: 0, ..*sequence };
        let lists = Self::new(&image, ListRows::Queries);
        let mut share = PairEfficiency { inside: 0, visited: lists.visited() };
        for work in &lists.work {
            for entry in &lists.entries[work.begin as usize..work.end as usize] {
                share.inside += match entry.mask {
                    ListEntry::WHOLE => work.count as u64 * TOKENS as u64,
                    mask => Masks::pairs(&lists.masks, mask as usize),
                };
            }
        }
        share
    }
}

/// Pairs that see each other, among all that a kernel computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairEfficiency {
    /// Pairs of a query and a key it sees.
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
    /// Numbers alone, for the emulation: counts, then each table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.slots, self.work.len())?;
        self.work.iter().try_for_each(|work| write_work(f, work))?;
        writeln!(f, "{}", self.joins.len())?;
        self.joins.iter().try_for_each(|work| write_work(f, work))?;
        writeln!(f, "{}", self.entries.len())?;
        self.entries.iter().try_for_each(|entry| writeln!(f, "{} {} {}", entry.first, entry.count, entry.mask))?;
        writeln!(f, "{}", self.masks.len())?;
        self.masks.chunks(16).try_for_each(|words| {
            words.iter().try_for_each(|word| write!(f, "{word} "))?;
            writeln!(f)
        })
    }
}

fn write_work(f: &mut fmt::Formatter<'_>, work: &WorkItem) -> fmt::Result {
    writeln!(f, "{} {} {} {} {}", work.first, work.count, work.begin, work.end, work.slot)
}

/// Tokens of a tile.
pub(super) const TOKENS: usize = 64;

/// What part of the sequence a tile belongs to, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SequencePart {
    Text(usize),
    Image(usize),
    Pooled,
}

/// What a row sees without a look at distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RowRange {
    text: bool,
    image: bool,
    pooled: bool,
    /// The padding that stands for every mask: the row's own text tile.
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
    /// Runs that all rows of a kind share.
    shared: Vec<(RowRange, Range<usize>)>,
}

impl<'a> ListBuilder<'a> {
    fn new(sequence: &SequenceLayout<'a>, rows: ListRows) -> Self {
        let (text, image) = (sequence.text.tokens(), sequence.places.len());
        Self {
            rows,
            padded: matches!(sequence.text, TextPadding::Padded(_)),
            limit: sequence.limit,
            text: chop(0..text),
            image: image_tiles(sequence.places, text),
            pooled: chop(text + image..text + image + sequence.pooled),
            masks: Masks::new(sequence.places, text),
            entries: Vec::new(),
            shared: Vec::new(),
        }
    }

    /// `longest` gives the most entries of a part from those of the image's longest list.
    fn build(mut self, longest: impl Fn(usize) -> usize) -> VisitLists {
        let (mut runs, mut of_image) = (Vec::new(), 0);
        for (part, tile) in self.row_tiles() {
            let run = match (part, self.limit) {
                (SequencePart::Image(number), Some(limit)) => self.windowed(number, limit),
                _ => self.whole(part),
            };
            of_image = of_image.max(if matches!(part, SequencePart::Image(_)) { run.len() } else { 0 });
            runs.push((tile, run));
        }
        let longest = longest(of_image);
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

    /// Rows of the launch: pooled context has no queries.
    fn row_tiles(&self) -> Vec<(SequencePart, TokenTile)> {
        let text = self.text.iter().enumerate().map(|(number, tile)| (SequencePart::Text(number), tile.clone()));
        let image = self.image.iter().enumerate().map(|(number, tile)| (SequencePart::Image(number), tile.clone()));
        let pooled =
            self.pooled.iter().filter(|_| self.rows == ListRows::Keys).map(|tile| (SequencePart::Pooled, tile.clone()));
        text.chain(image).chain(pooled).collect()
    }

    /// All that a row sees where no distance counts.
    fn whole(&mut self, part: SequencePart) -> Range<usize> {
        let queries = self.rows == ListRows::Queries;
        let whole = RowRange {
            text: part != SequencePart::Pooled,
            image: true,
            pooled: queries && matches!(part, SequencePart::Image(_)) && !self.pooled.is_empty(),
            padding: match part {
                SequencePart::Text(number) if self.padded && !queries => Some(number),
                _ => None,
            },
        };
        self.shared_run(whole)
    }

    fn shared_run(&mut self, whole: RowRange) -> Range<usize> {
        if let Some((_, run)) = self.shared.iter().find(|(known, _)| *known == whole) {
            return run.clone();
        }
        let begin = self.entries.len();
        self.add_whole(whole);
        self.shared.push((whole, begin..self.entries.len()));
        begin..self.entries.len()
    }

    /// What image tile `number` sees of text and pooled context, and of the image around it.
    fn windowed(&mut self, number: usize, limit: i32) -> Range<usize> {
        let begin = self.entries.len();
        let pooled = self.rows == ListRows::Queries;
        self.add_whole(RowRange { text: true, image: false, pooled: false, padding: None });
        for column in near(&self.image, number, limit) {
            let tile = &self.image[column];
            let mask = match self.masks.meeting(&self.image[number], tile, limit) {
                TileOverlap::Apart => continue,
                TileOverlap::Whole => ListEntry::WHOLE,
                TileOverlap::Masked(mask) => mask,
            };
            self.entries.push(ListEntry { first: tile.tokens.start as i32, count: tile.tokens.len() as i32, mask });
        }
        self.add_whole(RowRange { text: false, image: false, pooled, padding: None });
        begin..self.entries.len()
    }

    fn add_whole(&mut self, whole: RowRange) {
        let padded_columns = self.padded && self.rows == ListRows::Queries;
        let parts = [(whole.text, &self.text), (whole.image, &self.image), (whole.pooled, &self.pooled)];
        for (part, (_, tiles)) in parts.iter().enumerate().filter(|(_, (seen, _))| *seen) {
            for (number, tile) in tiles.iter().enumerate() {
                let text_tile = if part == 0 && padded_columns { Some(number) } else { whole.padding };
                let mask = match text_tile {
                    Some(text_tile) => -2 - text_tile as i32,
                    None => self.masks.columns(tile.tokens.len()),
                };
                self.entries.push(ListEntry { first: tile.tokens.start as i32, count: tile.tokens.len() as i32, mask });
            }
        }
    }
}

impl VisitLists {
    fn add_work(&mut self, tile: &TokenTile, run: Range<usize>, longest: usize) {
        let (first, count) = (tile.tokens.start as i32, tile.tokens.len() as i32);
        let (parts, first_slot) = (run.len().div_ceil(longest), self.slots as i32);
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
