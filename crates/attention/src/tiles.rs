//! [`TileOrder`]: image tokens in small patches, and what part of the keys a patch of queries has to visit.
//!
//! Keys are visited by cells of 16 tokens, longer where a grid is thinner; queries are taken by tiles of two cells.
//! Cells stand in groups of 2 x 2, so that whole neighbourhoods are long runs of the sequence. Knows no tensor.

use crate::{Radius, TileEfficiency, TileShape, TokenGrid};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Queries that are computed side by side.
pub(crate) const LANES: usize = clearform_ops::simd::ROW;

/// Tokens of a cell, two of which fill the lanes: finer than a tile, so that less is visited in vain.
pub(crate) const CELL: usize = LANES / 2;

/// The shape that least is visited in vain with, and that kernels of a GPU expect: 2 x 2 of them are one of their tiles.
pub(crate) const SQUARE: TileShape = TileShape { height: 4, width: 4 };

/// A patch of tokens that stand one after the other.
#[derive(Debug, Clone)]
pub(crate) struct Tile {
    /// Positions in tile order.
    pub tokens: Range<usize>,
    rows: Range<i32>,
    columns: Range<i32>,
}

/// Keys that stand one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyRange {
    /// Positions in tile order.
    pub tokens: Range<usize>,
    /// Key by key, a bit for each query of the tile that sees it; empty where all see all.
    pub seen: Vec<u32>,
}

/// For each tile of queries the keys it visits.
pub(crate) type Visits = Vec<Vec<KeyRange>>;

/// How far a tile's queries see a range of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cover {
    /// Each query sees each key.
    Whole,
    /// The distance decides.
    Edge,
}

/// The cells of one grid, found by their row and column.
#[derive(Debug)]
struct CellMap {
    cell_height: usize,
    cell_width: usize,
    columns: usize,
    index: Vec<u32>,
}

/// The order of image tokens by tiles.
#[derive(Debug)]
pub(crate) struct TileOrder {
    /// For each position in tile order, the one in raster order.
    pub raster_of: Vec<u32>,
    /// For each position in raster order, the one in tile order.
    pub tile_of: Vec<u32>,
    /// Row of each token, in tile order.
    pub rows: Vec<i32>,
    /// Column of each token, in tile order.
    pub columns: Vec<i32>,
    /// The tiles of queries, in order.
    pub tiles: Vec<Tile>,
    cells: Vec<Tile>,
    maps: Vec<CellMap>,
    /// By the radius' limit. Every layer and step asks for the same few.
    visits: Mutex<BTreeMap<i32, Arc<Visits>>>,
    /// The same for the kernels of a GPU.
    #[cfg(feature = "cuda")]
    pub lists: crate::fused::KnownLists,
}

impl TileOrder {
    /// Row and column of each token.
    pub fn places(&self) -> Vec<(i32, i32)> {
        self.rows.iter().copied().zip(self.columns.iter().copied()).collect()
    }

    /// The order of `grids`, one after the other, by cells of the shape `cell`, which holds [`CELL`] tokens.
    pub(crate) fn new(grids: &[TokenGrid], cell: TileShape) -> Self {
        let tokens = grids.iter().map(|grid| grid.tokens()).sum();
        let mut order = Self {
            raster_of: Vec::with_capacity(tokens),
            tile_of: vec![0; tokens],
            rows: Vec::with_capacity(tokens),
            columns: Vec::with_capacity(tokens),
            tiles: Vec::new(),
            cells: Vec::new(),
            maps: Vec::new(),
            visits: Mutex::default(),
            #[cfg(feature = "cuda")]
            lists: Default::default(),
        };
        for grid in grids {
            order.add_grid(*grid, cell);
        }
        for (tiled, raster) in order.raster_of.iter().enumerate() {
            order.tile_of[*raster as usize] = tiled as u32;
        }
        order
    }

    /// What the queries of each tile have to visit, in order: runs of whole cells and runs of edge cells. Computed once.
    pub(crate) fn visits(&self, radius: Radius) -> Arc<Visits> {
        let known = || self.visits.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(visits) = known().get(&radius.limit()) {
            return visits.clone();
        }
        // Away from the lock: a thread that waits for its part of the work may take up other work, which may ask for
        // visits too. Two may compute the same; whoever is first is kept.
        let visits: Visits = self.tiles.par_iter().map(|tile| self.ranges(tile, radius)).collect();
        known().entry(radius.limit()).or_insert_with(|| Arc::new(visits)).clone()
    }

    fn ranges(&self, tile: &Tile, radius: Radius) -> Vec<KeyRange> {
        let limit = radius.limit();
        let mut found: Vec<(u32, Cover)> = Vec::new();
        for map in &self.maps {
            let reach = radius.tokens().ceil().min(TokenGrid::LIMIT as f64) as i32;
            for index in map.near(tile, reach) {
                let key = &self.cells[index as usize];
                if nearest(tile, key) < limit {
                    let cover = if farthest(tile, key) < limit { Cover::Whole } else { Cover::Edge };
                    found.push((index, cover));
                }
            }
        }
        found.sort_unstable_by_key(|(index, _)| *index);
        let runs = self.join(&found);
        let range = |(tokens, cover): (Range<usize>, Cover)| {
            let seen = if cover == Cover::Edge { self.seen(tile, tokens.clone(), limit) } else { Vec::new() };
            KeyRange { tokens, seen }
        };
        runs.into_iter().map(range).collect()
    }

    /// For each key, which queries of `tile` lie inside the disc around it.
    fn seen(&self, tile: &Tile, keys: Range<usize>, limit: i32) -> Vec<u32> {
        let inside = |query: usize, key: usize| {
            let (dy, dx) = (self.rows[query] - self.rows[key], self.columns[query] - self.columns[key]);
            dx * dx + dy * dy < limit
        };
        let bits = |key| tile.tokens.clone().rev().fold(0, |bits, query| bits << 1 | u32::from(inside(query, key)));
        keys.map(bits).collect()
    }

    pub(crate) fn share_inside(&self, radius: Radius) -> TileEfficiency {
        let mut share = TileEfficiency { inside: 0, visited: 0 };
        for (tile, ranges) in self.tiles.iter().zip(self.visits(radius).iter()) {
            for range in ranges {
                share.visited += (LANES * range.tokens.len()) as u64;
                share.inside += match range.seen.as_slice() {
                    [] => (tile.tokens.len() * range.tokens.len()) as u64,
                    seen => seen.iter().map(|bits| u64::from(bits.count_ones())).sum(),
                };
            }
        }
        share
    }

    fn join(&self, found: &[(u32, Cover)]) -> Vec<(Range<usize>, Cover)> {
        let mut runs: Vec<(Range<usize>, Cover)> = Vec::new();
        for (index, cover) in found {
            let tokens = self.cells[*index as usize].tokens.clone();
            match runs.last_mut() {
                Some((last, same)) if same == cover && last.end == tokens.start => last.end = tokens.end,
                _ => runs.push((tokens, *cover)),
            }
        }
        runs
    }

    fn add_grid(&mut self, grid: TokenGrid, cell: TileShape) {
        let (cell_height, cell_width) = cell_extents(grid, cell);
        let (rows, columns) = (grid.height.div_ceil(cell_height), grid.width.div_ceil(cell_width));
        let mut map = CellMap { cell_height, cell_width, columns, index: vec![0; rows * columns] };
        let first = self.raster_of.len();
        for pair in groups(rows, columns).iter().flat_map(|group| group.chunks(2)) {
            let start = self.cells.len();
            for (row, column) in pair {
                map.index[row * columns + column] = self.cells.len() as u32;
                let rows = row * cell_height..grid.height.min((row + 1) * cell_height);
                let columns = column * cell_width..grid.width.min((column + 1) * cell_width);
                self.add_cell(grid, first, rows, columns);
            }
            self.tiles.push(around(&self.cells[start], &self.cells[self.cells.len() - 1]));
        }
        self.maps.push(map);
    }

    fn add_cell(&mut self, grid: TokenGrid, first: usize, rows: Range<usize>, columns: Range<usize>) {
        let start = self.raster_of.len();
        for row in rows.clone() {
            for column in columns.clone() {
                self.raster_of.push((first + row * grid.width + column) as u32);
                self.rows.push(row as i32);
                self.columns.push(column as i32);
            }
        }
        let signed = |range: Range<usize>| range.start as i32..range.end as i32;
        let tokens = start..self.raster_of.len();
        self.cells.push(Tile { tokens, rows: signed(rows), columns: signed(columns) });
    }
}

/// The smallest patch that holds both.
fn around(a: &Tile, b: &Tile) -> Tile {
    let both = |a: &Range<i32>, b: &Range<i32>| a.start.min(b.start)..a.end.max(b.end);
    Tile { tokens: a.tokens.start..b.tokens.end, rows: both(&a.rows, &b.rows), columns: both(&a.columns, &b.columns) }
}

impl CellMap {
    /// The cells within `reach` rows and columns of `tile`.
    fn near(&self, tile: &Tile, reach: i32) -> impl Iterator<Item = u32> + '_ {
        let bounds = |range: &Range<i32>, extent: usize, count: usize| {
            let first = (range.start - reach).max(0) as usize / extent;
            first.min(count)..count.min((range.end + reach) as usize / extent + 1)
        };
        let rows = bounds(&tile.rows, self.cell_height, self.index.len() / self.columns);
        let columns = bounds(&tile.columns, self.cell_width, self.columns);
        rows.flat_map(move |row| columns.clone().map(move |column| self.index[row * self.columns + column]))
    }
}

/// Those of `cell`, or as near to as many tokens as a thin grid allows.
fn cell_extents(grid: TokenGrid, cell: TileShape) -> (usize, usize) {
    let width = grid.width.min(CELL / grid.height.min(cell.height));
    (grid.height.min(CELL / width), width)
}

/// Rows and columns of cells, in groups of 2 x 2.
fn groups(rows: usize, columns: usize) -> Vec<Vec<(usize, usize)>> {
    let group = |row: usize, column: usize| {
        let inner = (row..rows.min(row + 2)).flat_map(|r| (column..columns.min(column + 2)).map(move |c| (r, c)));
        inner.collect()
    };
    (0..rows).step_by(2).flat_map(|row| (0..columns).step_by(2).map(move |column| group(row, column))).collect()
}

fn nearest(a: &Tile, b: &Tile) -> i32 {
    let gap = |a: &Range<i32>, b: &Range<i32>| 0.max(b.start - (a.end - 1)).max(a.start - (b.end - 1));
    let (dy, dx) = (gap(&a.rows, &b.rows), gap(&a.columns, &b.columns));
    dy * dy + dx * dx
}

fn farthest(a: &Tile, b: &Tile) -> i32 {
    let span = |a: &Range<i32>, b: &Range<i32>| (b.end - 1 - a.start).max(a.end - 1 - b.start);
    let (dy, dx) = (span(&a.rows, &b.rows), span(&a.columns, &b.columns));
    dy * dy + dx * dx
}
