//! [`Problem`]: extents of one call, its query tiles, and the runs of keys that each has to visit.

use crate::sequence::Sequence;
use crate::tiles::{Cover, KeyRange, LANES};
use crate::{Geometry, Radius};
use candle_core::Result;
use std::ops::Range;

/// One call of the kernel.
#[derive(Debug)]
pub(super) struct Problem {
    pub batch: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub queries: usize,
    pub keys: usize,
    /// Query tiles in sequence order; together they hold each query once.
    pub tiles: Vec<QueryTile>,
    /// Runs of text keys that count, batch by batch.
    pub text_runs: Vec<Vec<Range<usize>>>,
    /// Row and column of each query and key of the image; text has none.
    pub places: Places,
    /// Squared distances below this are inside the disc.
    pub limit: i32,
}

/// Up to 16 queries and the image and pooled keys they visit. Text comes on top.
#[derive(Debug)]
pub(super) struct QueryTile {
    pub queries: Range<usize>,
    pub ranges: Vec<KeyRange>,
}

/// Places of image tokens, in sequence order from `first` on.
#[derive(Debug)]
pub(super) struct Places {
    pub first: usize,
    pub rows: Vec<i32>,
    pub columns: Vec<i32>,
}

impl Problem {
    pub fn new(sequence: &Sequence, geometry: &Geometry, radius: Option<Radius>) -> Result<Self> {
        let (batch, queries, heads, head_dim) = sequence.query.dims4()?;
        let order = geometry.order();
        let places = Places { first: sequence.text, rows: order.rows.clone(), columns: order.columns.clone() };
        Ok(Self {
            batch,
            heads,
            head_dim,
            queries,
            keys: sequence.key.dim(1)?,
            tiles: text_tiles(sequence).chain(image_tiles(sequence, geometry, radius)).collect(),
            text_runs: text_runs(geometry.visible_text(batch, sequence.text)?, batch, sequence.text),
            places,
            limit: radius.map_or(i32::MAX, Radius::limit),
        })
    }

    /// Everything that `tile` visits in one batch entry.
    pub fn visits<'a>(&'a self, entry: usize, tile: &'a QueryTile) -> impl Iterator<Item = KeyRange> + 'a {
        self.text_runs[entry].iter().cloned().map(whole).chain(tile.ranges.iter().cloned())
    }

    /// Values of the queries, of one batch entry and head.
    pub fn query_count(&self) -> usize {
        self.queries * self.head_dim
    }

    /// Values of the keys, of one batch entry and head.
    pub fn key_count(&self) -> usize {
        self.keys * self.head_dim
    }
}

fn whole(tokens: Range<usize>) -> KeyRange {
    KeyRange { tokens, cover: Cover::Whole }
}

fn text_tiles(sequence: &Sequence) -> impl Iterator<Item = QueryTile> {
    let (text, image) = (sequence.text, sequence.image);
    let tile = move |start: usize| QueryTile {
        queries: start..text.min(start + LANES),
        ranges: vec![whole(text..text + image)],
    };
    (0..text).step_by(LANES).map(tile)
}

fn image_tiles(sequence: &Sequence, geometry: &Geometry, radius: Option<Radius>) -> impl Iterator<Item = QueryTile> {
    let (text, image, pooled) = (sequence.text, sequence.image, sequence.pooled);
    let shift = move |tokens: &Range<usize>| tokens.start + text..tokens.end + text;
    let order = geometry.order();
    order.tiles.iter().map(move |tile| {
        let mut ranges = match radius {
            None => vec![whole(text..text + image)],
            Some(radius) => order.ranges(tile, radius),
        };
        if radius.is_some() {
            ranges.iter_mut().for_each(|range| range.tokens = shift(&range.tokens));
        }
        if pooled > 0 {
            ranges.push(whole(text + image..text + image + pooled));
        }
        QueryTile { queries: shift(&tile.tokens), ranges }
    })
}

fn text_runs(visible: Option<Vec<Vec<bool>>>, batch: usize, text: usize) -> Vec<Vec<Range<usize>>> {
    match visible {
        None if text == 0 => vec![Vec::new(); batch],
        None => vec![std::iter::once(0..text).collect(); batch],
        Some(visible) => visible.iter().map(|row| runs(row)).collect(),
    }
}

/// Runs of true.
fn runs(visible: &[bool]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (token, _) in visible.iter().enumerate().filter(|(_, visible)| **visible) {
        match runs.last_mut() {
            Some(last) if last.end == token => last.end += 1,
            _ => runs.push(token..token + 1),
        }
    }
    runs
}
