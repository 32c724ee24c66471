//! [`KernelProblem`]: extents of one call, its query tiles, and the runs of keys that each has to visit.

use crate::sequence::JointSequence;
use crate::tiles::{KeyRange, LANES, Visits};
use crate::{Geometry, Radius};
use candle_core::Result;
use clearform_ops::simd::CpuFeatures;
use std::ops::Range;
use std::sync::Arc;

/// Keys from which on threads work on one batch entry together.
const SHARED: usize = 1024;

/// Query tiles that a thread takes at a time: few, because those of text visit far more than those of the image.
const TILES: usize = 4;

/// One call of the kernel.
#[derive(Debug)]
pub(super) struct Problem {
    pub batch: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub queries: usize,
    pub keys: usize,
    /// What its arithmetic is compiled for.
    pub features: CpuFeatures,
    /// Query tiles in sequence order; together they hold each query once.
    pub tiles: Vec<QueryTile>,
    /// Runs of text keys that count, batch by batch.
    text_runs: Vec<Vec<Range<usize>>>,
    text: usize,
    image: usize,
    /// What each tile of the image visits of the image; none where all visit all.
    visits: Option<Arc<Visits>>,
}

/// Up to 32 queries.
#[derive(Debug)]
pub(super) struct QueryTile {
    pub queries: Range<usize>,
    /// Number of the tile in the image; text has none.
    image: Option<usize>,
}

/// Keys that a query tile visits.
#[derive(Debug, Clone)]
pub(super) struct KeyVisit<'a> {
    /// Positions in the sequence.
    pub tokens: Range<usize>,
    /// Key by key, a bit for each query that sees it; empty where all see all.
    pub seen: &'a [u32],
}

impl Problem {
    pub fn new(
        sequence: &JointSequence,
        geometry: &Geometry,
        radius: Option<Radius>,
        features: CpuFeatures,
    ) -> Result<Self> {
        let (batch, queries, heads, head_dim) = sequence.query.dims4()?;
        Ok(Self {
            batch,
            heads,
            head_dim,
            queries,
            keys: sequence.key.dim(1)?,
            features,
            tiles: text_tiles(sequence.text).chain(image_tiles(sequence.text, geometry)).collect(),
            text_runs: text_runs(geometry.visible_text(batch, sequence.text)?, batch, sequence.text),
            text: sequence.text,
            image: sequence.image,
            visits: radius.map(|radius| geometry.order().visits(radius)),
        })
    }

    /// Everything that `tile` visits in one batch entry: text, image, and, from the image, pooled context.
    pub fn visits<'a>(&'a self, entry: usize, tile: &'a QueryTile) -> impl Iterator<Item = KeyVisit<'a>> {
        let (first, end) = (self.text, self.text + self.image);
        let window = self.visits.as_deref().zip(tile.image).map(|(visits, image)| &visits[image]);
        let near = window
            .into_iter()
            .flatten()
            .map(move |KeyRange { tokens, seen }| KeyVisit { tokens: first + tokens.start..first + tokens.end, seen });
        let image = window.is_none().then(|| whole(first..end));
        let pooled = (tile.image.is_some() && end < self.keys).then(|| whole(end..self.keys));
        self.text_runs[entry].iter().cloned().map(whole).chain(image).chain(near).chain(pooled)
    }

    /// Batch entries that must be left to one job: all where one alone keeps every thread busy, so that threads share a
    /// head's keys and values in the cache.
    pub fn entries_in_turn(&self) -> usize {
        if self.keys >= SHARED { self.batch } else { 1 }
    }

    /// Query tiles that one job takes: all where batch entries keep the threads busy.
    pub fn tiles_in_turn(&self) -> usize {
        if self.keys < SHARED && self.batch > 1 { self.tiles.len() } else { TILES }
    }

    /// Where in the sequence the image tokens lie that the queries of `tiles` visit.
    pub fn image_keys(&self, tiles: &[QueryTile]) -> Range<usize> {
        let whole = self.text..self.text + self.image;
        let images: Option<Vec<usize>> = tiles.iter().map(|tile| tile.image).collect();
        let Some((visits, images)) = self.visits.as_deref().zip(images) else { return whole };
        let place = |token: usize| self.text + token;
        let visited = images.into_iter().flat_map(|image| &visits[image]).map(|range| &range.tokens);
        visited.fold(whole.end..whole.start, |hull, visited| {
            hull.start.min(place(visited.start))..hull.end.max(place(visited.end))
        })
    }

    /// Text tokens, which stand before those of the image.
    pub fn text(&self) -> usize {
        self.text
    }

    /// Where in the sequence the image ends and pooled context begins.
    pub fn image_end(&self) -> usize {
        self.text + self.image
    }

    /// Numbers of a token.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// What products of queries and keys are multiplied with.
    pub fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
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

fn whole<'a>(tokens: Range<usize>) -> KeyVisit<'a> {
    KeyVisit { tokens, seen: &[] }
}

fn text_tiles(text: usize) -> impl Iterator<Item = QueryTile> {
    (0..text).step_by(LANES).map(move |start| QueryTile { queries: start..text.min(start + LANES), image: None })
}

fn image_tiles(text: usize, geometry: &Geometry) -> impl Iterator<Item = QueryTile> {
    let tiles = geometry.order().tiles.iter().enumerate();
    tiles.map(move |(index, tile)| QueryTile {
        queries: text + tile.tokens.start..text + tile.tokens.end,
        image: Some(index),
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
