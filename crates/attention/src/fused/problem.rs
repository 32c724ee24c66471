//! [`Problem`]: dimensions of one call, its query tiles, and the runs of keys that each visits.

use crate::sequence::JointSequence;
use crate::tiles::{KeyRange, LANES, Visits};
use crate::{Geometry, Radius};
use candle_core::Result;
use clearform_ops::simd::CpuFeatures;
use std::ops::Range;
use std::sync::Arc;

/// From so many keys on all threads work on one head at a time. 1024 keys and values of 128 f32 are 1 MiB, which
/// threads then share in the cache instead of each evicting those of others.
const SHARED: usize = 1024;

/// Query tiles per job: few, because tiles of text visit far more keys than those of the image.
const TILES: usize = 4;

/// One call of the kernel.
#[derive(Debug)]
pub(super) struct Problem {
    pub batch: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub queries: usize,
    pub keys: usize,
    /// The instruction set to use.
    pub features: CpuFeatures,
    /// Query tiles in sequence order, which contain each query once.
    pub tiles: Vec<QueryTile>,
    /// Per batch entry, runs of text keys that are not padding.
    text_runs: Vec<Vec<Range<usize>>>,
    text: usize,
    image: usize,
    /// The image keys that each tile of the image visits; none where all tiles visit all keys.
    visits: Option<Arc<Visits>>,
}

/// Up to 32 queries.
#[derive(Debug)]
pub(super) struct QueryTile {
    pub queries: Range<usize>,
    /// Index of the tile in the image; none for text.
    image: Option<usize>,
}

/// A run of keys that a query tile visits.
#[derive(Debug, Clone)]
pub(super) struct KeyVisit<'a> {
    /// Positions in the sequence.
    pub tokens: Range<usize>,
    /// For each key the queries that attend to it, one bit each; empty where all attend to all.
    pub mask: &'a [u32],
}

impl Problem {
    /// The problem of one call.
    ///
    /// # Errors
    /// A text mask of the wrong shape.
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

    /// The keys that `tile` visits in one batch entry: text, image and, for image queries, pooled context.
    pub fn visits<'a>(&'a self, entry: usize, tile: &'a QueryTile) -> impl Iterator<Item = KeyVisit<'a>> {
        let first = self.text;
        let end = self.text + self.image;
        let window = self.visits.as_deref().zip(tile.image).map(|(visits, image)| &visits[image]);
        let near = window
            .into_iter()
            .flatten()
            .map(move |KeyRange { tokens, mask }| KeyVisit { tokens: first + tokens.start..first + tokens.end, mask });
        let image = window.is_none().then(|| unmasked(first..end));
        let pooled = (tile.image.is_some() && end < self.keys).then(|| unmasked(end..self.keys));
        self.text_runs[entry].iter().cloned().map(unmasked).chain(image).chain(near).chain(pooled)
    }

    /// Batch entries per job: all where one keeps every thread busy, so that threads share the keys and values of a
    /// head in the cache.
    pub fn entries_per_job(&self) -> usize {
        if self.keys >= SHARED { self.batch } else { 1 }
    }

    /// Query tiles per job: all where batch entries keep the threads busy.
    pub fn tiles_per_job(&self) -> usize {
        if self.keys < SHARED && self.batch > 1 { self.tiles.len() } else { TILES }
    }

    /// The range of the sequence that contains all image keys that `tiles` visit.
    pub fn image_keys(&self, tiles: &[QueryTile]) -> Range<usize> {
        let all = self.text..self.text + self.image;
        let images: Option<Vec<usize>> = tiles.iter().map(|tile| tile.image).collect();
        let Some((visits, images)) = self.visits.as_deref().zip(images) else { return all };
        let position = |token: usize| self.text + token;
        let visited = images.into_iter().flat_map(|image| &visits[image]).map(|range| &range.tokens);
        visited.fold(all.end..all.start, |hull, visited| {
            hull.start.min(position(visited.start))..hull.end.max(position(visited.end))
        })
    }

    /// Text tokens, which come before the image.
    pub fn text(&self) -> usize {
        self.text
    }

    /// The position where the image ends and pooled context begins.
    pub fn image_end(&self) -> usize {
        self.text + self.image
    }

    /// Elements of a token.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The scale of scores, 1 / √head_dim.
    pub fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Elements of the queries of one batch entry and head.
    pub fn query_count(&self) -> usize {
        self.queries * self.head_dim
    }

    /// Elements of the keys of one batch entry and head.
    pub fn key_count(&self) -> usize {
        self.keys * self.head_dim
    }
}

/// A visit without a mask.
fn unmasked<'a>(tokens: Range<usize>) -> KeyVisit<'a> {
    KeyVisit { tokens, mask: &[] }
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

/// Runs of visible tokens.
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
