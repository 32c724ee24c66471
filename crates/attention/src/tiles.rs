//! [`TileOrder`]: image tokens in patches of up to 16, and what part of the keys a patch of queries has to visit.
//!
//! A tile is a patch of 4 x 4 tokens, longer where a grid is thinner; tiles stand in groups of 2 x 2, so that whole
//! neighbourhoods are long runs of the sequence. Knows no tensor.

use crate::{Radius, TokenGrid};
use std::fmt;
use std::ops::Range;

/// Queries that are computed side by side.
pub(crate) const LANES: usize = 16;

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
    /// Positions in the sequence.
    pub tokens: Range<usize>,
    /// Whether every query of the tile sees all of them.
    pub cover: Cover,
}

/// How far a tile's queries see a range of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cover {
    /// Each query sees each key.
    Whole,
    /// The distance decides.
    Edge,
}

/// The tiles of one grid, found by their row and column.
#[derive(Debug)]
struct TileMap {
    tile_height: usize,
    tile_width: usize,
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
    /// The tiles, in order.
    pub tiles: Vec<Tile>,
    maps: Vec<TileMap>,
}

/// Pairs of a query and a key that lie inside the disc, among all that the kernel visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Pairs inside the disc.
    pub inside: u64,
    /// Pairs that are computed, empty lanes of ragged tiles included.
    pub visited: u64,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = 100.0 * self.inside as f64 / self.visited as f64;
        write!(f, "{} of {} visited pairs lie inside the disc ({percent:.0}%)", self.inside, self.visited)
    }
}

impl TileOrder {
    pub(crate) fn new(grids: &[TokenGrid]) -> Self {
        let tokens = grids.iter().map(|grid| grid.tokens()).sum();
        let mut order = Self {
            raster_of: Vec::with_capacity(tokens),
            tile_of: vec![0; tokens],
            rows: Vec::with_capacity(tokens),
            columns: Vec::with_capacity(tokens),
            tiles: Vec::new(),
            maps: Vec::new(),
        };
        for grid in grids {
            order.add_grid(*grid);
        }
        for (tiled, raster) in order.raster_of.iter().enumerate() {
            order.tile_of[*raster as usize] = tiled as u32;
        }
        order
    }

    /// What the queries of `tile` have to visit, in order: runs of whole tiles and runs of edge tiles.
    pub(crate) fn ranges(&self, tile: &Tile, radius: Radius) -> Vec<KeyRange> {
        let limit = radius.limit();
        let mut found: Vec<(u32, Cover)> = Vec::new();
        for map in &self.maps {
            let reach = radius.tokens().ceil().min(TokenGrid::LIMIT as f64) as i32;
            for index in map.near(tile, reach) {
                let key = &self.tiles[index as usize];
                if nearest(tile, key) < limit {
                    let cover = if farthest(tile, key) < limit { Cover::Whole } else { Cover::Edge };
                    found.push((index, cover));
                }
            }
        }
        found.sort_unstable_by_key(|(index, _)| *index);
        self.join(&found)
    }

    pub(crate) fn share_inside(&self, radius: Radius) -> Share {
        let mut share = Share { inside: 0, visited: 0 };
        for tile in &self.tiles {
            for range in self.ranges(tile, radius) {
                share.visited += (LANES * range.tokens.len()) as u64;
                share.inside += match range.cover {
                    Cover::Whole => (tile.tokens.len() * range.tokens.len()) as u64,
                    Cover::Edge => self.pairs_inside(tile, &range, radius.limit()),
                };
            }
        }
        share
    }

    fn pairs_inside(&self, tile: &Tile, range: &KeyRange, limit: i32) -> u64 {
        let inside = |query: usize, key: usize| {
            let (dy, dx) = (self.rows[query] - self.rows[key], self.columns[query] - self.columns[key]);
            dx * dx + dy * dy < limit
        };
        let count = |query: usize| range.tokens.clone().filter(|key| inside(query, *key)).count() as u64;
        tile.tokens.clone().map(count).sum()
    }

    fn join(&self, found: &[(u32, Cover)]) -> Vec<KeyRange> {
        let mut ranges: Vec<KeyRange> = Vec::new();
        for (index, cover) in found {
            let tokens = self.tiles[*index as usize].tokens.clone();
            match ranges.last_mut() {
                Some(last) if last.cover == *cover && last.tokens.end == tokens.start => last.tokens.end = tokens.end,
                _ => ranges.push(KeyRange { tokens, cover: *cover }),
            }
        }
        ranges
    }

    fn add_grid(&mut self, grid: TokenGrid) {
        let (tile_height, tile_width) = tile_extents(grid);
        let (rows, columns) = (grid.height.div_ceil(tile_height), grid.width.div_ceil(tile_width));
        let mut map = TileMap { tile_height, tile_width, columns, index: vec![0; rows * columns] };
        let first = self.raster_of.len();
        for (row, column) in group_by_group(rows, columns) {
            map.index[row * columns + column] = self.tiles.len() as u32;
            let rows = row * tile_height..grid.height.min((row + 1) * tile_height);
            let columns = column * tile_width..grid.width.min((column + 1) * tile_width);
            self.add_tile(grid, first, rows, columns);
        }
        self.maps.push(map);
    }

    fn add_tile(&mut self, grid: TokenGrid, first: usize, rows: Range<usize>, columns: Range<usize>) {
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
        self.tiles.push(Tile { tokens, rows: signed(rows), columns: signed(columns) });
    }
}

impl TileMap {
    /// The tiles within `reach` rows and columns of `tile`.
    fn near(&self, tile: &Tile, reach: i32) -> impl Iterator<Item = u32> + '_ {
        let bounds = |range: &Range<i32>, extent: usize, count: usize| {
            let first = (range.start - reach).max(0) as usize / extent;
            first.min(count)..count.min((range.end + reach) as usize / extent + 1)
        };
        let rows = bounds(&tile.rows, self.tile_height, self.index.len() / self.columns);
        let columns = bounds(&tile.columns, self.tile_width, self.columns);
        rows.flat_map(move |row| columns.clone().map(move |column| self.index[row * self.columns + column]))
    }
}

/// 4 x 4, or as near to 16 tokens as a thin grid allows.
fn tile_extents(grid: TokenGrid) -> (usize, usize) {
    let width = grid.width.min(LANES / grid.height.min(4));
    (grid.height.min(LANES / width), width)
}

/// Rows and columns of tiles, in groups of 2 x 2.
fn group_by_group(rows: usize, columns: usize) -> impl Iterator<Item = (usize, usize)> {
    let group = move |row: usize, column: usize| {
        let inner = (row..rows.min(row + 2)).flat_map(move |r| (column..columns.min(column + 2)).map(move |c| (r, c)));
        inner.collect::<Vec<_>>()
    };
    (0..rows).step_by(2).flat_map(move |row| (0..columns).step_by(2).flat_map(move |column| group(row, column)))
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
