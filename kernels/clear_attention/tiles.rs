//! [`TokenTile`]: up to 64 consecutive tokens that are close to each other.

use std::ops::Range;

/// Tokens of a tile, as in the kernels.
pub(super) const TILE_TOKENS: usize = 64;

/// A run of tokens and its bounding rectangle, which is empty outside the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TokenTile {
    /// Positions in the sequence.
    pub tokens: Range<usize>,
    /// Rows of the grid.
    pub rows: Range<i32>,
    /// Columns of the grid.
    pub columns: Range<i32>,
}

/// Tiles of text or pooled tokens, which have no position in the grid.
pub(super) fn tiles_without_positions(tokens: Range<usize>) -> Vec<TokenTile> {
    let tile =
        |start: usize| TokenTile { tokens: start..tokens.end.min(start + TILE_TOKENS), rows: 0..0, columns: 0..0 };
    tokens.clone().step_by(TILE_TOKENS).map(tile).collect()
}

/// Tiles of the image, in the order of its tokens. A tile ends where its rectangle would cover more than 64 positions,
/// so that patches stay whole in any order by patches.
pub(super) fn image_tiles(positions: &[(i32, i32)], first: usize) -> Vec<TokenTile> {
    let mut tiles: Vec<TokenTile> = Vec::new();
    for (token, (row, column)) in positions.iter().enumerate() {
        let alone =
            TokenTile { tokens: first + token..first + token + 1, rows: *row..row + 1, columns: *column..column + 1 };
        match tiles.last_mut().map(|last| (around(last, &alone), last)) {
            Some((joined, last)) if joined.tokens.len() <= TILE_TOKENS && area(&joined) <= TILE_TOKENS => {
                *last = joined
            }
            _ => tiles.push(alone),
        }
    }
    tiles
}

/// Ascending indices of the tiles that may hold a token within the squared distance `limit` of a token of tile `index`.
pub(super) fn near(tiles: &[TokenTile], index: usize, limit: i32) -> impl Iterator<Item = usize> + '_ {
    let center = &tiles[index];
    let is_near = move |tile: &TokenTile| {
        let dy = gap(&center.rows, &tile.rows);
        let dx = gap(&center.columns, &tile.columns);
        dy * dy + dx * dx < i64::from(limit)
    };
    tiles.iter().enumerate().filter(move |(_, tile)| is_near(tile)).map(|(index, _)| index)
}

/// The smallest tile that holds both.
fn around(a: &TokenTile, b: &TokenTile) -> TokenTile {
    let union = |a: &Range<i32>, b: &Range<i32>| a.start.min(b.start)..a.end.max(b.end);
    TokenTile {
        tokens: a.tokens.start..b.tokens.end,
        rows: union(&a.rows, &b.rows),
        columns: union(&a.columns, &b.columns),
    }
}

fn area(tile: &TokenTile) -> usize {
    tile.rows.len() * tile.columns.len()
}

/// Distance of the nearest rows or columns.
fn gap(a: &Range<i32>, b: &Range<i32>) -> i64 {
    i64::from(0.max(b.start - (a.end - 1)).max(a.start - (b.end - 1)))
}
