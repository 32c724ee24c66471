//! [`TileEfficiency`]: how much of the work of a tiled kernel is inside the disc.

use crate::{Radius, TileShape, TokenGrid};
use std::collections::BTreeMap;
use std::fmt;

/// Pairs of a query and a key inside the disc, among all that a kernel computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileEfficiency {
    /// Pairs inside the disc.
    pub inside: u64,
    /// Pairs that are computed, the empty positions of ragged tiles included.
    pub visited: u64,
}

impl TileEfficiency {
    /// The efficiency of a kernel that processes queries and keys of one grid by tiles. It visits a tile of keys if one
    /// of its tokens may be inside the disc around a query of the tile. Tiles are aligned to the grid's first token.
    pub fn of_tiles(grid: TokenGrid, radius: Radius, query: TileShape, key: TileShape) -> Self {
        let token = TileShape { height: 1, width: 1 };
        let area = (query.tokens() * key.tokens()) as u64;
        Self { inside: near(grid, radius, token, token), visited: area * near(grid, radius, query, key) }
    }

    /// `inside` over `visited`, from 0 to 1; 1 where nothing is visited.
    pub fn ratio(self) -> f64 {
        if self.visited == 0 { 1.0 } else { self.inside as f64 / self.visited as f64 }
    }
}

impl fmt::Display for TileEfficiency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = 100.0 * self.ratio();
        write!(f, "{} of {} visited pairs lie inside the disc ({percent:.0}%)", self.inside, self.visited)
    }
}

/// Number of pairs of a query tile and a key tile whose nearest tokens are inside the disc.
fn near(grid: TokenGrid, radius: Radius, query: TileShape, key: TileShape) -> u64 {
    let limit = i64::from(radius.limit());
    let rows = gaps(grid.height, query.height, key.height, limit);
    let columns = gaps(grid.width, query.width, key.width, limit);
    let pairs = rows.iter().flat_map(|row| columns.iter().map(move |column| (row, column)));
    pairs
        .filter(|((dy, _), (dx, _))| *dy * *dy + *dx * *dx < limit)
        .map(|((_, rows), (_, columns))| rows * columns)
        .sum()
}

/// For each distance the number of pairs of a query interval and a key interval, along one side of a grid, whose
/// nearest tokens are that far apart. Only distances whose square is below `limit`.
fn gaps(side: usize, query: usize, key: usize, limit: i64) -> BTreeMap<i64, u64> {
    let mut gaps = BTreeMap::new();
    let reach = limit.isqrt() + 1;
    let end = |start: i64, length: usize| (start + length as i64).min(side as i64);
    for query_start in (0..side as i64).step_by(query) {
        let query_end = end(query_start, query);
        let first = (query_start - reach - key as i64).max(0) / key as i64 * key as i64;
        for key_start in (first..(query_end + reach).min(side as i64)).step_by(key) {
            let gap = 0.max(key_start - (query_end - 1)).max(query_start - (end(key_start, key) - 1));
            if gap * gap < limit {
                *gaps.entry(gap).or_insert(0) += 1;
            }
        }
    }
    gaps
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tile((height, width): (usize, usize)) -> TileShape {
        TileShape::new(height, width).unwrap()
    }

    fn efficiency(grid: (usize, usize), radius: f64, query: (usize, usize), key: (usize, usize)) -> TileEfficiency {
        let grid = TokenGrid::new(grid.0, grid.1).unwrap();
        TileEfficiency::of_tiles(grid, Radius::new(radius).unwrap(), tile(query), tile(key))
    }

    /// Percent of computed pairs inside the disc for r = 8, 16 and 32, as published for CLEAR and computed by another
    /// program. Blocks of 128 tokens in row-major order are two rows of 64, or part of a row. One of the 60 values
    /// differs: for 512 x 512 by 16 x 8 and 8 x 8 at r = 8 the table has 26, where 25.46 rounds to 25.
    #[test]
    fn efficiency_matches_the_published_table() {
        let patches = [((8, 8), (8, 8)), ((16, 8), (8, 8)), ((16, 8), (16, 8)), ((16, 16), (8, 8))];
        let table = [
            (64, (2, 64), [[16, 34, 63], [36, 55, 75], [28, 47, 69], [20, 47, 68], [22, 40, 64]]),
            (128, (1, 128), [[10, 19, 36], [35, 52, 69], [27, 44, 63], [18, 44, 61], [20, 37, 57]]),
            (256, (1, 128), [[5, 10, 19], [34, 51, 67], [26, 42, 60], [17, 42, 58], [20, 36, 54]]),
            (512, (1, 128), [[4, 8, 16], [34, 50, 66], [25, 42, 59], [17, 42, 57], [19, 35, 53]]),
        ];
        for (side, row_major, columns) in table {
            for ((query, key), percents) in [(row_major, row_major)].into_iter().chain(patches).zip(columns) {
                for (radius, percent) in [8.0, 16.0, 32.0].into_iter().zip(percents) {
                    let efficiency = efficiency((side, side), radius, query, key);
                    let found = (100.0 * efficiency.ratio()).round() as i32;
                    assert_eq!(found, percent, "{side}, r = {radius}, {query:?} / {key:?}: {efficiency}");
                }
            }
        }
    }

    #[test]
    fn pairs_written_out_are_counted() {
        for (grid, radius, query, key) in [
            ((7, 5), 2.5, (2, 3), (3, 2)),
            ((1, 9), 0.5, (4, 4), (1, 1)),
            ((6, 11), 100.0, (4, 4), (5, 7)),
            ((9, 4), 3.0, (8, 8), (1, 3)),
        ] {
            let tiles = |(height, width): (usize, usize)| {
                let starts =
                    (0..grid.0).step_by(height).flat_map(move |y| (0..grid.1).step_by(width).map(move |x| (y, x)));
                starts.map(move |(y, x)| (y..grid.0.min(y + height), x..grid.1.min(x + width))).collect::<Vec<_>>()
            };
            let pairs_inside = |a: &(_, _), b: &(_, _)| {
                let tokens = |(rows, columns): &(std::ops::Range<usize>, std::ops::Range<usize>)| {
                    rows.clone().flat_map(|y| columns.clone().map(move |x| (y as f64, x as f64))).collect::<Vec<_>>()
                };
                let is_near =
                    |a: (f64, f64), b: (f64, f64)| (a.0 - b.0).powi(2) + (a.1 - b.1).powi(2) < radius * radius;
                let keys = tokens(b);
                tokens(a).into_iter().map(|a| keys.iter().filter(|b| is_near(a, **b)).count() as u64).sum::<u64>()
            };
            let mut want = TileEfficiency { inside: 0, visited: 0 };
            for (a, b) in tiles(query).iter().flat_map(|a| tiles(key).into_iter().map(move |b| (a, b))) {
                let count = pairs_inside(a, &b);
                want.inside += count;
                want.visited += if count > 0 { (query.0 * query.1 * key.0 * key.1) as u64 } else { 0 };
            }
            assert_eq!(efficiency(grid, radius, query, key), want, "{grid:?}, {radius}, {query:?} / {key:?}");
        }
    }
}
