//! What the forward and the backward share: one head's packed keys and values, 32 queries in lanes, and their scores
//! over a chunk of keys.

use super::problem::{KeyVisit, Problem, QueryTile};
use crate::tiles::LANES;
use clearform_ops::simd::{
    self, CpuFeatures, Element, Isa, Lane, MatrixProduct, Real, SimdKernel, Strided, Vector, load_row, pack_transposed,
    store_row,
};
use rayon::prelude::*;
use std::ops::Range;

/// Keys of a chunk. 48 keys of 128 f32 (24 KiB) and their scores of 32 queries (6 KiB) stay in an L1 cache of 32 KiB,
/// as Zen 3 and Zen 4 have; in pairs of bf16, 96 keys are as large. 48 is also a multiple of the panel heights 12
/// (AVX-512), 3 (AVX2) and 16 (AMX).
pub(super) const fn chunk_rows<F: Lane>() -> usize {
    48 * F::WIDTH
}

/// One head of a (batch, tokens, heads, head_dim) tensor.
#[derive(Clone, Copy)]
pub(super) struct HeadView<'a, E> {
    values: &'a [E],
    tokens: usize,
    heads: usize,
    head_dim: usize,
    index: usize,
    features: CpuFeatures,
}

impl<'a, E: Element> HeadView<'a, E> {
    /// The head `index` = entry · heads + head.
    pub fn new(values: &'a [E], problem: &Problem, tokens: usize, index: usize) -> Self {
        let Problem { heads, head_dim, features, .. } = *problem;
        Self { values, tokens, heads, head_dim, index, features }
    }

    /// The elements of a token.
    #[inline(always)]
    pub fn row(&self, token: usize) -> &'a [E] {
        let entry = self.index / self.heads;
        let head = self.index % self.heads;
        &self.values[((entry * self.tokens + token) * self.heads + head) * self.head_dim..][..self.head_dim]
    }

    /// Packs all tokens along the channels.
    ///
    /// # Shapes
    /// (tokens, head_dim / WIDTH).
    pub fn rows<F: Lane<Sum = E::Work>>(&self, out: &mut Vec<F>) {
        let steps = self.head_dim.div_ceil(F::WIDTH);
        out.resize(self.tokens * steps, F::default());
        out.par_chunks_mut(BLOCK * steps).enumerate().for_each(|(block, out)| {
            self.features.run(PackRows { view: *self, first: block * BLOCK, out });
        });
    }

    /// Packs all tokens along the tokens.
    ///
    /// # Shapes
    /// (tokens / WIDTH, head_dim).
    pub fn columns<F: Lane<Sum = E::Work>>(&self, out: &mut Vec<F>) {
        out.resize(self.tokens.div_ceil(F::WIDTH) * self.head_dim, F::default());
        out.par_chunks_mut(BLOCK * self.head_dim).enumerate().for_each(|(block, out)| {
            self.features.run(PackColumns { view: *self, first: block * BLOCK * F::WIDTH, out });
        });
    }
}

/// Rows per task when packing: few tasks, each of them 512 KiB of 128 f32 per row.
const BLOCK: usize = 1024;

struct PackRows<'a, E, F> {
    view: HeadView<'a, E>,
    first: usize,
    out: &'a mut [F],
}

impl<E: Element, F: Lane<Sum = E::Work>> SimdKernel for PackRows<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let steps = self.view.head_dim.div_ceil(F::WIDTH);
        for (row, out) in self.out.chunks_exact_mut(steps).enumerate() {
            F::pack_row(self.view.row(self.first + row), out);
        }
    }
}

struct PackColumns<'a, E, F> {
    view: HeadView<'a, E>,
    first: usize,
    out: &'a mut [F],
}

impl<E: Element, F: Lane<Sum = E::Work>> SimdKernel for PackColumns<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let view = self.view;
        for (row, out) in self.out.chunks_exact_mut(view.head_dim).enumerate() {
            let token = self.first + row * F::WIDTH;
            let second = (token + 1 < view.tokens).then(|| view.row(token + 1));
            F::pack_two_rows(view.row(token), second, out);
        }
    }
}

/// Packs the rows of `tile` into lanes: `out[channel / WIDTH][lane]`. Lanes without a query are 0.
pub(super) fn load_lanes<E: Element, F: Lane<Sum = E::Work>>(out: &mut [F], view: HeadView<'_, E>, tile: &QueryTile) {
    view.features.run(LoadLanes { out, view, tile });
}

struct LoadLanes<'a, E, F> {
    out: &'a mut [F],
    view: HeadView<'a, E>,
    tile: &'a QueryTile,
}

impl<E: Element, F: Lane<Sum = E::Work>> SimdKernel for LoadLanes<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        pack_transposed(self.tile.queries.clone().map(|token| self.view.row(token)), self.out);
    }
}

/// Keys that are scored together: runs of the sequence.
#[derive(Default)]
pub(super) struct Chunk<'a> {
    pub runs: Vec<KeyRun<'a>>,
    /// Rows of scores. A run is padded to whole lanes at both ends, so there may be rows without a key between runs.
    pub rows: usize,
    /// The ranges of packed tokens that contain the keys.
    packed: Vec<Range<usize>>,
}

/// A run of keys in a chunk.
pub(super) struct KeyRun<'a> {
    pub keys: Range<usize>,
    /// First row of its scores.
    pub row: usize,
    mask: &'a [u32],
}

impl KeyRun<'_> {
    /// Its rows of `scores`.
    pub fn scores<'s, T>(&self, scores: &'s mut [T]) -> &'s mut [T] {
        &mut scores[self.row * LANES..][..self.keys.len() * LANES]
    }
}

/// Calls `work` for chunks of the keys of `visits`. A chunk may mix text, whole cells and edge cells: only their masks
/// differ, which are applied run by run, and full chunks make products efficient.
pub(super) fn for_chunks<'a, F: Lane>(
    chunk: &mut Chunk<'a>,
    visits: impl Iterator<Item = KeyVisit<'a>>,
    mut work: impl FnMut(&Chunk<'a>),
) {
    for mut visit in visits {
        while !visit.tokens.is_empty() {
            chunk.take::<F>(&mut visit);
            if chunk.rows == chunk_rows::<F>() {
                work(chunk);
                chunk.clear();
            }
        }
    }
    if chunk.rows > 0 {
        work(chunk);
        chunk.clear();
    }
}

impl<'a> Chunk<'a> {
    /// Moves as many keys of `visit` as fit to the chunk.
    fn take<F: Lane>(&mut self, visit: &mut KeyVisit<'a>) {
        let KeyVisit { tokens, mask } = visit;
        let lead = tokens.start % F::WIDTH;
        let keys = tokens.start..tokens.end.min(tokens.start + chunk_rows::<F>() - self.rows - lead);
        let (taken, rest) = mask.split_at(mask.len().min(keys.len()));
        tokens.start = keys.end;
        *mask = rest;
        self.packed.push(keys.start / F::WIDTH..keys.end.div_ceil(F::WIDTH));
        let row = self.rows + lead;
        self.rows = (row + keys.len()).next_multiple_of(F::WIDTH);
        self.runs.push(KeyRun { keys, row, mask: taken });
    }

    fn clear(&mut self) {
        self.runs.clear();
        self.packed.clear();
        self.rows = 0;
    }
}

/// `scores[key][lane] = Σ rows(key, channel) · lanes[channel][lane]`, for [`HeadView::rows`] of one head. Rows without a
/// key are not written.
pub(super) fn score<F: Lane>(scores: &mut [F::Sum], rows: &[F], chunk: &Chunk<'_>, lanes: &[F], features: CpuFeatures) {
    let steps = lanes.len() / LANES;
    let channels = 0..steps;
    let inner = std::slice::from_ref(&channels);
    for run in &chunk.runs {
        let a = Strided { values: &rows[run.keys.start * steps..], row_step: steps, inner_step: 1 };
        let product = MatrixProduct { rows: run.keys.len(), inner, a, b: lanes, b_step: LANES };
        product.write_to(run.scores(scores), LANES, features);
    }
}

/// Sets scores of queries that do not attend to a key to -∞.
pub(super) fn mask_scores<T: Real>(scores: &mut [T], chunk: &Chunk<'_>, features: CpuFeatures) {
    for run in chunk.runs.iter().filter(|run| !run.mask.is_empty()) {
        features.run(MaskScores { scores: run.scores(scores), mask: run.mask });
    }
}

/// `out[channel][lane] += Σ columns(key, channel) · weights[key][lane]`, for [`HeadView::columns`] of one head.
pub(super) fn add_weighted<F: Lane>(
    out: &mut [F::Sum],
    columns: &[F],
    chunk: &Chunk<'_>,
    weights: &[F],
    features: CpuFeatures,
) {
    let head_dim = out.len() / LANES;
    let a = Strided { values: columns, row_step: 1, inner_step: head_dim };
    let product = MatrixProduct { rows: head_dim, inner: &chunk.packed, a, b: weights, b_step: LANES };
    product.add_to(out, LANES, features);
}

struct MaskScores<'a, T> {
    scores: &'a mut [T],
    mask: &'a [u32],
}

impl<T: Real> SimdKernel for MaskScores<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (scores, mask) in self.scores.chunks_exact_mut(LANES).zip(self.mask) {
            let mut row = load_row::<T, L>(scores);
            for (vector, lanes) in row.iter_mut().enumerate() {
                *lanes = lanes.keep((mask >> (vector * simd::LANES)) as u16);
            }
            store_row::<T, L>(row, scores);
        }
    }
}
