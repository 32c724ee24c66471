//! [`Masks`]: one bit for each row and column of two tiles, in the order of a warp's registers. Tiles with the same
//! relative positions share a mask.

use super::layout::{ListEntry, ListRows};
use super::tiles::{TILE_TOKENS, TokenTile};
use std::collections::HashMap;

/// Threads of a block, each of which holds one word of a mask.
const THREADS: usize = 128;

/// Masks that hide padding, one for each batch entry and text tile, to which a [`ListEntry::mask`] of -2 - i refers.
/// `visible` has one flag per token for each batch entry.
///
/// # Shapes
/// (batch, text tiles, 128).
pub fn padding(visible: &[Vec<bool>], rows: ListRows) -> Vec<u32> {
    let tiles = visible.iter().flat_map(|entry| entry.chunks(TILE_TOKENS));
    let mask = |tile: &[bool]| {
        mask_words(|row, column| {
            tile.get(if rows == ListRows::Queries { column } else { row }).copied().unwrap_or(false)
        })
    };
    tiles.flat_map(mask).collect()
}

/// How much of two tiles is inside the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TileOverlap {
    /// No pair.
    Apart,
    /// Every pair, of 64 columns.
    Whole,
    /// The pairs of the mask with this index.
    Masked(i32),
}

/// Positions of the tokens of a tile, relative to its first.
type TilePositions = Vec<(i32, i32)>;

/// The masks of some lists, without duplicates.
pub(super) struct Masks<'a> {
    /// 128 words each.
    pub words: Vec<u32>,
    positions: &'a [(i32, i32)],
    first: usize,
    shapes: HashMap<TilePositions, usize>,
    /// Index in `shapes`, by the first token of a tile.
    shape_of: HashMap<usize, usize>,
    /// By both shapes and the offset between the first tokens.
    overlaps: HashMap<(usize, usize, (i32, i32)), TileOverlap>,
    /// Indices of the masks of ragged tiles, by their columns.
    columns: HashMap<usize, i32>,
}

impl<'a> Masks<'a> {
    /// Masks over image tokens at `positions`, which begin at `first` in the sequence.
    pub fn new(positions: &'a [(i32, i32)], first: usize) -> Self {
        let words = Vec::new();
        let shapes = HashMap::new();
        let shape_of = HashMap::new();
        Self { words, positions, first, shapes, shape_of, overlaps: HashMap::new(), columns: HashMap::new() }
    }

    /// Number of pairs in mask `index`.
    pub fn pairs(words: &[u32], index: usize) -> u64 {
        words[index * THREADS..][..THREADS].iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The index of the mask that shows the first `count` columns to each row.
    pub fn first_columns(&mut self, count: usize) -> i32 {
        if count == TILE_TOKENS {
            return ListEntry::WHOLE;
        }
        if let Some(index) = self.columns.get(&count) {
            return *index;
        }
        let index = self.add(&mask_words(|_, column| column < count));
        self.columns.insert(count, index);
        index
    }

    /// The overlap of image tiles `row` and `column` in the window of squared distances below `limit`.
    pub fn overlap(&mut self, row: &TokenTile, column: &TokenTile, limit: i32) -> TileOverlap {
        let from = self.origin(row);
        let to = self.origin(column);
        let key = (self.shape(row), self.shape(column), (to.0 - from.0, to.1 - from.1));
        if let Some(overlap) = self.overlaps.get(&key) {
            return *overlap;
        }
        let overlap = self.compute_overlap(row, column, limit);
        self.overlaps.insert(key, overlap);
        overlap
    }

    fn compute_overlap(&mut self, row: &TokenTile, column: &TokenTile, limit: i32) -> TileOverlap {
        let rows = self.positions_of(row);
        let columns = self.positions_of(column);
        let seen = |row: usize, column: usize| match (rows.get(row), columns.get(column)) {
            (Some(a), Some(b)) => {
                let dy = i64::from(a.0 - b.0);
                let dx = i64::from(a.1 - b.1);
                dy * dy + dx * dx < i64::from(limit)
            }
            _ => false,
        };
        let mask = mask_words(seen);
        match Self::pairs(&mask, 0) as usize {
            0 => TileOverlap::Apart,
            pairs if pairs == rows.len() * TILE_TOKENS => TileOverlap::Whole,
            _ => TileOverlap::Masked(self.add(&mask)),
        }
    }

    fn add(&mut self, mask: &[u32]) -> i32 {
        self.words.extend_from_slice(mask);
        (self.words.len() / THREADS) as i32 - 1
    }

    fn positions_of(&self, tile: &TokenTile) -> &'a [(i32, i32)] {
        &self.positions[tile.tokens.start - self.first..tile.tokens.end - self.first]
    }

    fn origin(&self, tile: &TokenTile) -> (i32, i32) {
        self.positions_of(tile)[0]
    }

    fn shape(&mut self, tile: &TokenTile) -> usize {
        if let Some(shape) = self.shape_of.get(&tile.tokens.start) {
            return *shape;
        }
        let (row, column) = self.origin(tile);
        let relative: TilePositions = self.positions_of(tile).iter().map(|(y, x)| (y - row, x - column)).collect();
        let next = self.shapes.len();
        let shape = *self.shapes.entry(relative).or_insert(next);
        self.shape_of.insert(tile.tokens.start, shape);
        shape
    }
}

/// A word per thread, with bit 4 i + j for row 16 warp + lane / 4 + j / 2 · 8 and column 8 i + lane % 4 · 2 + j % 2:
/// the elements of a product that the tensor cores leave in the registers of that thread.
fn mask_words(seen: impl Fn(usize, usize) -> bool) -> Vec<u32> {
    let bit = |thread: usize, bit: usize| {
        let row = thread / 32 * 16 + thread % 32 / 4 + bit % 4 / 2 * 8;
        let column = bit / 4 * 8 + thread % 4 * 2 + bit % 2;
        u32::from(seen(row, column)) << bit
    };
    (0..THREADS).map(|thread| (0..32).map(|index| bit(thread, index)).sum()).collect()
}
