//! [`TileOrder`]: image tokens in the order of 2-D tiles, and the keys that each tile of queries visits.
//!
//! A cell is a patch of 16 tokens, elongated where a grid is thin. Keys are visited by cells; a tile of queries is two
//! neighbouring cells.

use crate::{Radius, TileEfficiency, TileShape, TokenGrid};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Queries that are computed together, one per lane.
pub(crate) const LANES: usize = clearform_ops::simd::ROW;

/// Tokens of a cell. Two cells fill the lanes; keys are visited by single cells, because finer cells follow the disc
/// more closely and fewer pairs are computed outside it.
pub(crate) const CELL: usize = LANES / 2;

/// The default shape of a cell, for which the fewest pairs outside the disc are computed. 2 x 2 of them are a tile of
/// the GPU kernels.
pub(crate) const SQUARE: TileShape = TileShape { height: 4, width: 4 };

/// A patch of consecutive tokens.
#[derive(Debug, Clone)]
pub(crate) struct Tile {
    /// Positions in tile order.
    pub tokens: Range<usize>,
    rows: Range<i32>,
    columns: Range<i32>,
}

/// A run of consecutive keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyRange {
    /// Positions in tile order.
    pub tokens: Range<usize>,
    /// For each key the queries of the tile that attend to it, one bit each; empty where all attend to all.
    pub mask: Vec<u32>,
}

/// The keys that each tile of queries visits.
pub(crate) type Visits = Vec<Vec<KeyRange>>;

/// How much of a cell the window of a tile covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cover {
    /// Each query attends to each key.
    Whole,
    /// The edge of the disc crosses the cell.
    Edge,
}

/// The cells of one grid by row and column.
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
    /// For each position in tile order its position in raster order.
    pub raster_of: Vec<u32>,
    /// For each position in raster order its position in tile order.
    pub tile_of: Vec<u32>,
    /// Row of each token, in tile order.
    pub rows: Vec<i32>,
    /// Column of each token, in tile order.
    pub columns: Vec<i32>,
    /// The tiles of queries in order.
    pub tiles: Vec<Tile>,
    cells: Vec<Tile>,
    maps: Vec<CellMap>,
    /// Visits by [`Radius::limit`]. All layers and steps need the same few, so none is ever removed.
    visits: Mutex<BTreeMap<i32, Arc<Visits>>>,
    /// The lists of the GPU kernels.
    #[cfg(feature = "cuda")]
    pub lists: crate::device_lists::DeviceListCache,
}

impl TileOrder {
    /// Row and column of each token.
    pub fn positions(&self) -> Vec<(i32, i32)> {
        self.rows.iter().copied().zip(self.columns.iter().copied()).collect()
    }

    /// The order of `grids`, which follow each other, by cells of the shape `cell` of [`CELL`] tokens.
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

    /// The keys that each tile visits for `radius`, in order: runs of whole cells and runs of edge cells. Computed
    /// once.
    pub(crate) fn visits(&self, radius: Radius) -> Arc<Visits> {
        let lock = || self.visits.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(visits) = lock().get(&radius.limit()) {
            return visits.clone();
        }
        // Computed without the lock: while a thread of the pool waits, it may start other work that needs visits too,
        // and would deadlock. Two threads may compute the same visits; the first are kept.
        let visits: Visits = self.tiles.par_iter().map(|tile| self.ranges(tile, radius)).collect();
        lock().entry(radius.limit()).or_insert_with(|| Arc::new(visits)).clone()
    }

    /// The runs of keys that `tile` visits.
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
        let key_range = |(tokens, cover): (Range<usize>, Cover)| {
            let mask = if cover == Cover::Edge { self.mask(tile, tokens.clone(), limit) } else { Vec::new() };
            KeyRange { tokens, mask }
        };
        runs.into_iter().map(key_range).collect()
    }

    /// For each key the queries of `tile` inside the disc around it, one bit each.
    fn mask(&self, tile: &Tile, keys: Range<usize>, limit: i32) -> Vec<u32> {
        let is_inside = |query: usize, key: usize| {
            let dy = self.rows[query] - self.rows[key];
            let dx = self.columns[query] - self.columns[key];
            dx * dx + dy * dy < limit
        };
        let bits = |key| tile.tokens.clone().rev().fold(0, |bits, query| bits << 1 | u32::from(is_inside(query, key)));
        keys.map(bits).collect()
    }

    /// Pairs that are computed for `radius`, and those inside the disc.
    pub(crate) fn efficiency(&self, radius: Radius) -> TileEfficiency {
        let mut efficiency = TileEfficiency { inside: 0, visited: 0 };
        for (tile, ranges) in self.tiles.iter().zip(self.visits(radius).iter()) {
            for range in ranges {
                efficiency.visited += (LANES * range.tokens.len()) as u64;
                efficiency.inside += match range.mask.as_slice() {
                    [] => (tile.tokens.len() * range.tokens.len()) as u64,
                    mask => mask.iter().map(|bits| u64::from(bits.count_ones())).sum(),
                };
            }
        }
        efficiency
    }

    /// Joins consecutive cells with the same cover.
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
        let (cell_height, cell_width) = cell_size(grid, cell);
        let rows = grid.height.div_ceil(cell_height);
        let columns = grid.width.div_ceil(cell_width);
        let mut map = CellMap { cell_height, cell_width, columns, index: vec![0; rows * columns] };
        let first = self.raster_of.len();
        // In groups of 2 x 2 cells, so that neighbourhoods of whole cells are long runs of the sequence; each pair of
        // cells in a group is a tile of queries.
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
        let to_signed = |range: Range<usize>| range.start as i32..range.end as i32;
        let tokens = start..self.raster_of.len();
        self.cells.push(Tile { tokens, rows: to_signed(rows), columns: to_signed(columns) });
    }
}

/// The smallest patch that contains both.
fn around(a: &Tile, b: &Tile) -> Tile {
    let union = |a: &Range<i32>, b: &Range<i32>| a.start.min(b.start)..a.end.max(b.end);
    Tile { tokens: a.tokens.start..b.tokens.end, rows: union(&a.rows, &b.rows), columns: union(&a.columns, &b.columns) }
}

impl CellMap {
    /// The cells within `reach` rows and columns of `tile`.
    fn near(&self, tile: &Tile, reach: i32) -> impl Iterator<Item = u32> + '_ {
        let bounds = |range: &Range<i32>, size: usize, count: usize| {
            let first = (range.start - reach).max(0) as usize / size;
            first.min(count)..count.min((range.end + reach) as usize / size + 1)
        };
        let rows = bounds(&tile.rows, self.cell_height, self.index.len() / self.columns);
        let columns = bounds(&tile.columns, self.cell_width, self.columns);
        rows.flat_map(move |row| columns.clone().map(move |column| self.index[row * self.columns + column]))
    }
}

/// Height and width of `cell`, or of a cell of up to as many tokens where the grid is thinner.
fn cell_size(grid: TokenGrid, cell: TileShape) -> (usize, usize) {
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

/// Squared distance of the nearest tokens of two patches.
fn nearest(a: &Tile, b: &Tile) -> i32 {
    let gap = |a: &Range<i32>, b: &Range<i32>| 0.max(b.start - (a.end - 1)).max(a.start - (b.end - 1));
    let dy = gap(&a.rows, &b.rows);
    let dx = gap(&a.columns, &b.columns);
    dy * dy + dx * dx
}

/// Squared distance of the farthest tokens of two patches.
fn farthest(a: &Tile, b: &Tile) -> i32 {
    let span = |a: &Range<i32>, b: &Range<i32>| (b.end - 1 - a.start).max(a.end - 1 - b.start);
    let dy = span(&a.rows, &b.rows);
    let dx = span(&a.columns, &b.columns);
    dy * dy + dx * dx
}
