//! [`forward`]: attention with an online softmax, tile by tile.

use super::problem::{Problem, QueryTile};
use super::scores::{Chunk, HeadView, add_weighted, chunk_rows, for_chunks, load_lanes, mask_scores, score};
use super::workspaces::Workspaces;
use crate::tiles::LANES;
use clearform_ops::simd::{
    Element, Isa, Lane, Real, RowLanes, SimdKernel, VECTORS, Vector, add_row, load_row, store_row,
};
use rayon::prelude::*;
use std::ops::Range;

/// softmax(q kᵀ / √head_dim) v with products in lanes of `F`, and for each query the maximum of its scores and
/// 1 / Σ exp(score - maximum).
///
/// # Shapes
/// [query, key, value], each (batch, tokens, heads, head_dim) -> as query, and (batch · heads, queries).
pub(super) fn forward<E: Element, F: Lane<Sum = E::Work>>(
    problem: &Problem,
    inputs: [&[E]; 3],
) -> (Vec<E>, Vec<[E::Work; 2]>) {
    let mut out = vec![E::zero(); problem.batch * problem.queries * problem.width()];
    let mut scales = vec![[E::Work::ZERO; 2]; problem.batch * problem.heads * problem.queries];
    forward_into::<E, F>(problem, inputs, &mut out, &mut scales);
    (out, scales)
}

/// The same, into outputs whose old contents are ignored.
pub(super) fn forward_into<E: Element, F: Lane<Sum = E::Work>>(
    problem: &Problem,
    [query, key, value]: [&[E]; 3],
    out: &mut [E],
    scales: &mut [[E::Work; 2]],
) {
    let workspaces = &Workspaces::new();
    let outputs = out.par_chunks_mut(problem.queries * problem.width());
    let outputs = outputs.zip(scales.par_chunks_mut(problem.heads * problem.queries)).enumerate();
    outputs.with_min_len(problem.entries_per_job()).for_each_init(
        || (Vec::new(), Vec::new()),
        |(keys, values), (entry, (out, scales))| {
            for (head, scales) in scales.chunks_exact_mut(problem.queries).enumerate() {
                let index = entry * problem.heads + head;
                let query = HeadView::new(query, problem, problem.queries, index);
                let [key, value] = [key, value].map(|values| HeadView::new(values, problem, problem.keys, index));
                key.rows::<F>(keys);
                value.columns::<F>(values);
                ForwardHead { problem, entry, head, query, keys, values, workspaces }.run(&problem.tiles, out, scales);
            }
        },
    );
}

/// One head. `'p` is the lifetime of the problem, which workspaces borrow for longer than a head.
struct ForwardHead<'a, 'p, E: Element, F: Lane> {
    problem: &'p Problem,
    entry: usize,
    head: usize,
    query: HeadView<'a, E>,
    keys: &'a [F],
    values: &'a [F],
    workspaces: &'a Workspaces<ForwardScratch<'p, F>>,
}

impl<'p, E: Element, F: Lane<Sum = E::Work>> ForwardHead<'_, 'p, E, F> {
    /// Writes its channels of `out`, (queries, heads, head_dim), and its scales, for the queries of `tiles`.
    fn run(&self, tiles: &'p [QueryTile], out: &mut [E], scales: &mut [[E::Work; 2]]) {
        if tiles.len() <= self.problem.tiles_per_job() {
            return self.run_job(tiles, out, scales);
        }
        let (first, second) = tiles.split_at(tiles.len() / 2);
        let queries = second[0].queries.start - first[0].queries.start;
        let (first_out, second_out) = out.split_at_mut(queries * self.problem.width());
        let (first_scales, second_scales) = scales.split_at_mut(queries);
        rayon::join(|| self.run(first, first_out, first_scales), || self.run(second, second_out, second_scales));
    }

    fn run_job(&self, tiles: &'p [QueryTile], mut out: &mut [E], mut scales: &mut [[E::Work; 2]]) {
        let mut scratch = self.workspaces.take(|| ForwardScratch::new(self.problem.head_dim));
        for tile in tiles {
            let (tile_out, rest) = out.split_at_mut(tile.queries.len() * self.problem.width());
            let (tile_scales, rest_scales) = scales.split_at_mut(tile.queries.len());
            OutputTile { head: self, tile, out: tile_out, scales: tile_scales, scratch: &mut scratch }.run();
            (out, scales) = (rest, rest_scales);
        }
        self.workspaces.give(scratch);
    }
}

/// Working memory of a thread.
struct ForwardScratch<'p, F: Lane> {
    query: Vec<F>,
    out: Vec<F::Sum>,
    scores: Vec<F::Sum>,
    weights: Vec<F>,
    chunk: Chunk<'p>,
}

impl<F: Lane> ForwardScratch<'_, F> {
    fn new(head_dim: usize) -> Self {
        Self {
            query: vec![F::default(); head_dim.div_ceil(F::WIDTH) * LANES],
            out: vec![F::Sum::ZERO; head_dim * LANES],
            scores: vec![F::Sum::ZERO; chunk_rows::<F>() * LANES],
            weights: Vec::new(),
            chunk: Chunk::default(),
        }
    }
}

/// Maximum and sum of each query so far.
struct RunningMax<T> {
    max: [T; LANES],
    sum: [T; LANES],
}

/// One tile of queries and its output.
struct OutputTile<'a, 'p, E: Element, F: Lane<Sum = E::Work>> {
    head: &'a ForwardHead<'a, 'p, E, F>,
    tile: &'p QueryTile,
    out: &'a mut [E],
    scales: &'a mut [[E::Work; 2]],
    scratch: &'a mut ForwardScratch<'p, F>,
}

impl<E: Element, F: Lane<Sum = E::Work>> OutputTile<'_, '_, E, F> {
    fn run(mut self) {
        let problem = self.head.problem;
        load_lanes(&mut self.scratch.query, self.head.query, self.tile);
        self.scratch.out.fill(E::Work::ZERO);
        // LOWEST rather than -∞: as long as a query has no visible key, its maximum must stay finite, or max - max is
        // NaN.
        let mut online = RunningMax { max: [E::Work::LOWEST; LANES], sum: [E::Work::ZERO; LANES] };
        let mut chunk = std::mem::take(&mut self.scratch.chunk);
        let visits = problem.visits(self.head.entry, self.tile);
        for_chunks::<F>(&mut chunk, visits, |chunk| self.chunk(chunk, &mut online));
        self.scratch.chunk = chunk;
        self.finish(&online);
    }

    fn chunk(&mut self, chunk: &Chunk<'_>, online: &mut RunningMax<E::Work>) {
        let ForwardScratch { query, out, scores, weights, .. } = &mut *self.scratch;
        let features = self.head.problem.features;
        let scores = &mut scores[..chunk.rows * LANES];
        // Rows without a key must get weight 0.
        scores.fill(E::Work::MINUS_INFINITY);
        score(scores, self.head.keys, chunk, query, features);
        mask_scores(scores, chunk, features);
        features.run(OnlineSoftmax { online, scores, out, scale: self.head.problem.scale() });
        let weights = F::pack_across_rows(scores, LANES, weights, features);
        add_weighted(out, self.head.values, chunk, weights, features);
    }

    fn finish(&mut self, online: &RunningMax<E::Work>) {
        for (lane, scale) in self.scales.iter_mut().enumerate() {
            *scale = [online.max[lane], E::Work::ONE / online.sum[lane]];
        }
        let ForwardHead { problem, head, .. } = self.head;
        let channels = head * problem.head_dim..(head + 1) * problem.head_dim;
        problem.features.run(StoreOutput {
            sums: &self.scratch.out,
            scales: self.scales,
            out: self.out,
            width: problem.width(),
            channels,
        });
    }
}

/// Scales accumulators, `[channel][lane]`, and stores them as `channels` of the output rows.
struct StoreOutput<'a, E: Element> {
    sums: &'a [E::Work],
    scales: &'a [[E::Work; 2]],
    out: &'a mut [E],
    width: usize,
    channels: Range<usize>,
}

impl<E: Element> SimdKernel for StoreOutput<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let mut square = [[E::Work::ZERO; LANES]; LANES];
        for (block, sums) in self.sums.chunks(LANES * LANES).enumerate() {
            for (channel, sums) in sums.chunks_exact(LANES).enumerate() {
                square.iter_mut().zip(sums).for_each(|(row, sum)| row[channel] = *sum);
            }
            let first = self.channels.start + block * LANES;
            let rows = self.out.chunks_exact_mut(self.width).zip(self.scales).zip(&square);
            for ((out, [_, inverse_sum]), row) in rows {
                let out = &mut out[first..self.channels.end.min(first + LANES)];
                out.iter_mut().zip(row).for_each(|(out, sum)| *out = E::store(*sum * *inverse_sum));
            }
        }
    }
}

/// Turns products q k into exp(score - maximum), and rescales the sums so far to the new maximum.
struct OnlineSoftmax<'a, T> {
    online: &'a mut RunningMax<T>,
    scores: &'a mut [T],
    out: &'a mut [T],
    scale: f64,
}

impl<T: Real> SimdKernel for OnlineSoftmax<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let RunningMax { max: old, sum } = &mut *self.online;
        let scale = T::Vector::<L>::splat(T::cast(self.scale));
        let max = maximum::<T, L>(load_row::<T, L>(old), self.scores, scale);
        let (corrections, grew) = corrections::<T, L>(load_row::<T, L>(old), max);
        if grew {
            rescale::<T, L>(sum, corrections);
            for out in self.out.chunks_exact_mut(LANES) {
                rescale::<T, L>(out, corrections);
            }
        }
        // Each chunk has a sum of its own: adding every key to the sum so far would round more often.
        let mut sums = [T::Vector::<L>::splat(T::ZERO); VECTORS];
        let negated = negated::<T, L>(max);
        for scores in self.scores.chunks_exact_mut(LANES) {
            let mut row = load_row::<T, L>(scores);
            for vector in 0..VECTORS {
                row[vector] = row[vector].times_plus(scale, negated[vector]).exponential();
                sums[vector] = row[vector].plus(sums[vector]);
            }
            store_row::<T, L>(row, scores);
        }
        store_row::<T, L>(max, old);
        add_row::<T, L>(sums, sum);
    }
}

/// The maximum of `max` and the scores, which are `products` times `scale`.
#[inline(always)]
fn maximum<T: Real, L: Isa>(max: RowLanes<T, L>, products: &[T], scale: T::Vector<L>) -> RowLanes<T, L> {
    let mut top = [T::Vector::<L>::splat(T::MINUS_INFINITY); VECTORS];
    for products in products.chunks_exact(LANES) {
        let row = load_row::<T, L>(products);
        for vector in 0..VECTORS {
            top[vector] = row[vector].larger(top[vector]);
        }
    }
    for vector in 0..VECTORS {
        top[vector] = top[vector].times(scale).larger(max[vector]);
    }
    top
}

/// -row.
#[inline(always)]
pub(super) fn negated<T: Real, L: Isa>(mut row: RowLanes<T, L>) -> RowLanes<T, L> {
    for vector in &mut row {
        *vector = T::Vector::<L>::splat(T::ZERO).minus(*vector);
    }
    row
}

/// exp(old maximum - new maximum), by which the sums so far are rescaled, and whether any maximum grew.
#[inline(always)]
fn corrections<T: Real, L: Isa>(old: RowLanes<T, L>, max: RowLanes<T, L>) -> (RowLanes<T, L>, bool) {
    let mut corrections = max;
    let mut grew = false;
    for vector in 0..VECTORS {
        grew |= max[vector].differs(old[vector]);
        corrections[vector] = old[vector].minus(max[vector]).exponential();
    }
    (corrections, grew)
}

/// lanes · corrections.
#[inline(always)]
fn rescale<T: Real, L: Isa>(lanes: &mut [T], corrections: RowLanes<T, L>) {
    let mut row = load_row::<T, L>(lanes);
    for vector in 0..VECTORS {
        row[vector] = row[vector].times(corrections[vector]);
    }
    store_row::<T, L>(row, lanes);
}
