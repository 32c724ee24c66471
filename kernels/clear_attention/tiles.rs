//! [`TokenTile`]: up to 64 tokens that stand one after the other and lie close together. Knows no list.

use super::lists::TOKENS;
use std::ops::Range;

/// A run of tokens and the rectangle that holds them, which is empty outside of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TokenTile {
    /// Positions in the sequence.
    pub tokens: Range<usize>,
    /// Rows of the grid.
    pub rows: Range<i32>,
    /// Columns of the grid.
    pub columns: Range<i32>,
}

/// Tiles of tokens without a place.
pub(super) fn chop(tokens: Range<usize>) -> Vec<TokenTile> {
    let tile = |start: usize| TokenTile { tokens: start..tokens.end.min(start + TOKENS), rows: 0..0, columns: 0..0 };
    tokens.clone().step_by(TOKENS).map(tile).collect()
}

/// Tiles of the image, in the order of its tokens: a tile ends where its rectangle would hold more than 64 places, so
/// that the patches of any order that goes by patches stay whole.
pub(super) fn image_tiles(places: &[(i32, i32)], first: usize) -> Vec<TokenTile> {
    let mut tiles: Vec<TokenTile> = Vec::new();
    for (token, (row, column)) in places.iter().enumerate() {
        let alone =
            TokenTile { tokens: first + token..first + token + 1, rows: *row..row + 1, columns: *column..column + 1 };
        match tiles.last_mut().map(|last| (around(last, &alone), last)) {
            Some((joined, last)) if joined.tokens.len() <= TOKENS && area(&joined) <= TOKENS => *last = joined,
            _ => tiles.push(alone),
        }
    }
    tiles
}

/// Numbers of the tiles that may hold a token within the squared distance `limit` of one of tile `number`, ascending.
pub(super) fn near(tiles: &[TokenTile], number: usize, limit: i32) -> impl Iterator<Item = usize> + '_ {
    let own = &tiles[number];
    let close = move |tile: &TokenTile| {
        let (dy, dx) = (gap(&own.rows, &tile.rows), gap(&own.columns, &tile.columns));
        dy * dy + dx * dx < i64::from(limit)
    };
    tiles.iter().enumerate().filter(move |(_, tile)| close(tile)).map(|(number, _)| number)
}

fn around(a: &TokenTile, b: &TokenTile) -> TokenTile {
    let both = |a: &Range<i32>, b: &Range<i32>| a.start.min(b.start)..a.end.max(b.end);
    TokenTile {
        tokens: a.tokens.start..b.tokens.end,
        rows: both(&a.rows, &b.rows),
        columns: both(&a.columns, &b.columns),
    }
}

fn area(tile: &TokenTile) -> usize {
    tile.rows.len() * tile.columns.len()
}

fn gap(a: &Range<i32>, b: &Range<i32>) -> i64 {
    i64::from(0.max(b.start - (a.end - 1)).max(a.start - (b.end - 1)))
}
