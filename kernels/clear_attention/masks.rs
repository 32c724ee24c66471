//! [`Masks`]: who of a tile of rows sees whom of a tile of columns, a bit each, in the order of a warp's registers.
//! Tiles that lie to each other as others do share a mask. Knows no list.

use super::lists::{ListEntry, ListRows, TOKENS};
use super::tiles::TokenTile;
use std::collections::HashMap;

/// Threads of a block, which hold a word of a mask each.
const THREADS: usize = 128;

/// For each batch entry and text tile the mask that hides padding, as [`ListEntry::mask`] -2 - i names it. `visible` says
/// token by token what counts, batch entry by batch entry.
///
/// # Shapes
/// (batch, text tiles, 128).
pub fn padding(visible: &[Vec<bool>], rows: ListRows) -> Vec<u32> {
    let tiles = visible.iter().flat_map(|entry| entry.chunks(TOKENS));
    let mask = |tile: &[bool]| {
        words(|row, column| tile.get(if rows == ListRows::Queries { column } else { row }).copied().unwrap_or(false))
    };
    tiles.flat_map(mask).collect()
}

/// How two tiles meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TileOverlap {
    /// No row sees a column.
    Apart,
    /// Each row sees each of 64 columns.
    Whole,
    /// The mask of that number decides.
    Masked(i32),
}

/// Where the tokens of a tile lie, from its first on.
type TilePlaces = Vec<(i32, i32)>;

/// All masks so far.
pub(super) struct Masks<'a> {
    /// 128 words each.
    pub words: Vec<u32>,
    places: &'a [(i32, i32)],
    first: usize,
    shapes: HashMap<TilePlaces, usize>,
    /// By first token of a tile.
    shape_of: HashMap<usize, usize>,
    /// By both shapes and the way from the first token of one to that of the other.
    meetings: HashMap<(usize, usize, (i32, i32)), TileOverlap>,
    /// By count.
    columns: HashMap<usize, i32>,
}

impl<'a> Masks<'a> {
    /// Masks over image tokens at `places`, the first of which stands at `first` in the sequence.
    pub fn new(places: &'a [(i32, i32)], first: usize) -> Self {
        let (words, shapes, shape_of) = (Vec::new(), HashMap::new(), HashMap::new());
        Self { words, places, first, shapes, shape_of, meetings: HashMap::new(), columns: HashMap::new() }
    }

    /// Pairs that see each other in mask `number`.
    pub fn pairs(words: &[u32], number: usize) -> u64 {
        words[number * THREADS..][..THREADS].iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The mask where each row sees each of `count` columns.
    pub fn columns(&mut self, count: usize) -> i32 {
        if count == TOKENS {
            return ListEntry::WHOLE;
        }
        if let Some(number) = self.columns.get(&count) {
            return *number;
        }
        let number = self.add(&words(|_, column| column < count));
        self.columns.insert(count, number);
        number
    }

    /// How image tile `row` meets image tile `column` where a squared distance below `limit` is seen.
    pub fn meeting(&mut self, row: &TokenTile, column: &TokenTile, limit: i32) -> TileOverlap {
        let (from, to) = (self.place(row), self.place(column));
        let key = (self.shape(row), self.shape(column), (to.0 - from.0, to.1 - from.1));
        if let Some(meeting) = self.meetings.get(&key) {
            return *meeting;
        }
        let meeting = self.compare(row, column, limit);
        self.meetings.insert(key, meeting);
        meeting
    }

    fn compare(&mut self, row: &TokenTile, column: &TokenTile, limit: i32) -> TileOverlap {
        let (rows, columns) = (self.places_of(row), self.places_of(column));
        let seen = |row: usize, column: usize| match (rows.get(row), columns.get(column)) {
            (Some(a), Some(b)) => {
                let (dy, dx) = (i64::from(a.0 - b.0), i64::from(a.1 - b.1));
                dy * dy + dx * dx < i64::from(limit)
            }
            _ => false,
        };
        let mask = words(seen);
        match Self::pairs(&mask, 0) as usize {
            0 => TileOverlap::Apart,
            pairs if pairs == rows.len() * TOKENS => TileOverlap::Whole,
            _ => TileOverlap::Masked(self.add(&mask)),
        }
    }

    fn add(&mut self, mask: &[u32]) -> i32 {
        self.words.extend_from_slice(mask);
        (self.words.len() / THREADS) as i32 - 1
    }

    fn places_of(&self, tile: &TokenTile) -> &'a [(i32, i32)] {
        &self.places[tile.tokens.start - self.first..tile.tokens.end - self.first]
    }

    fn place(&self, tile: &TokenTile) -> (i32, i32) {
        self.places_of(tile)[0]
    }

    fn shape(&mut self, tile: &TokenTile) -> usize {
        if let Some(shape) = self.shape_of.get(&tile.tokens.start) {
            return *shape;
        }
        let (row, column) = self.place(tile);
        let relative: TilePlaces = self.places_of(tile).iter().map(|place| (place.0 - row, place.1 - column)).collect();
        let next = self.shapes.len();
        let shape = *self.shapes.entry(relative).or_insert(next);
        self.shape_of.insert(tile.tokens.start, shape);
        shape
    }
}

/// A word per thread: bit 4 i + j for row 16 warp + lane / 4 + j / 2 · 8 and column 8 i + lane % 4 · 2 + j % 2, where
/// the tensor cores leave the products.
fn words(seen: impl Fn(usize, usize) -> bool) -> Vec<u32> {
    let bit = |thread: usize, bit: usize| {
        let row = thread / 32 * 16 + thread % 32 / 4 + bit % 4 / 2 * 8;
        let column = bit / 4 * 8 + thread % 4 * 2 + bit % 2;
        u32::from(seen(row, column)) << bit
    };
    (0..THREADS).map(|thread| (0..32).map(|place| bit(thread, place)).sum()).collect()
}
