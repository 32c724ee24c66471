//! [`backward`]: the gradients, with probabilities recomputed from the maximum and sum of each query.
//!
//! Query tiles are divided into parts with sums of their own for keys and values, which threads compute in parallel.
//! The number of parts depends only on the problem, and their sums are added in order, so any number of threads gives
//! the same bits. A second pass by keys, as on the GPU, would compute the scores twice.

use super::forward::negated;
use super::problem::{Problem, QueryTile};
use super::scores::{Chunk, HeadView, add_weighted, chunk_rows, for_chunks, load_lanes, mask_scores, score};
use super::sums::{KeySums, add_parts, row_width};
use super::workspaces::Workspaces;
use crate::tiles::LANES;
use clearform_ops::simd::{
    CpuFeatures, Element, Isa, Lane, MatrixProduct, Real, SimdKernel, Strided, VECTORS, Vector, load_row, store_row,
};
use rayon::prelude::*;

/// Jobs to aim for, over all heads and their parts: enough to balance the load of 16 threads. Each part costs sums to
/// add, and the number must not depend on the machine, or results would.
const JOBS: usize = 16;

/// The fewest query tiles of a part, so that adding up its sums costs little in comparison.
const MIN_TILES: usize = 16;

/// Inputs and output of the forward, and the gradient of the output.
pub(super) struct BackwardInputs<'a, E> {
    pub query: &'a [E],
    pub key: &'a [E],
    pub value: &'a [E],
    pub out: &'a [E],
    pub grad: &'a [E],
    /// For each query the maximum of its scores and 1 / Σ exp(score - maximum), (batch · heads, queries). Combined into
    /// one log-sum-exp they would be rounded so coarsely in f32 that every probability loses a digit.
    pub scales: &'a [[f64; 2]],
}

/// Gradients of query, key and value, with products in lanes of `F`.
///
/// # Shapes
/// As the inputs.
pub(super) fn backward<E: Element, F: Lane<Sum = E::Work>>(
    problem: &Problem,
    inputs: &BackwardInputs<'_, E>,
) -> [Vec<E>; 3] {
    let heads = problem.batch * problem.heads;
    let zeros = |count: usize| vec![E::zero(); heads * count];
    let mut query = zeros(problem.query_count());
    let mut key = zeros(problem.key_count());
    let mut value = zeros(problem.key_count());
    backward_into::<E, F>(problem, inputs, [&mut query, &mut key, &mut value]);
    [
        tokens_first(&query, problem, problem.queries),
        tokens_first(&key, problem, problem.keys),
        tokens_first(&value, problem, problem.keys),
    ]
}

/// The same, into outputs whose old contents are ignored.
///
/// # Shapes
/// outputs (batch · heads, tokens, head_dim).
pub(super) fn backward_into<E: Element, F: Lane<Sum = E::Work>>(
    problem: &Problem,
    inputs: &BackwardInputs<'_, E>,
    [query, key, value]: [&mut [E]; 3],
) {
    let scratch = &Workspaces::new();
    let sums = &Workspaces::new();
    let query = query.par_chunks_mut(problem.query_count());
    let outputs = query.zip(key.par_chunks_mut(problem.key_count())).zip(value.par_chunks_mut(problem.key_count()));
    outputs.enumerate().for_each(|(index, ((query, key), value))| {
        let head = BackwardHead::<E, F>::new(problem, inputs, index);
        let parts: Vec<_> = head.parts(query).into_par_iter().map(|part| part.run(scratch, sums)).collect();
        add_parts(&parts, |sums| &sums.key, problem.head_dim, key);
        add_parts(&parts, |sums| &sums.value, problem.head_dim, value);
        parts.into_iter().for_each(|part| sums.give(part));
    });
}

/// Working memory of a thread. Rows of channels are padded to whole vectors.
struct BackwardScratch<'p, F: Lane> {
    /// Queries and gradients of a tile, `[channel / WIDTH][lane]`.
    query: Vec<F>,
    grad: Vec<F>,
    /// The same, `[lane / WIDTH][channel]`.
    query_rows: Vec<F>,
    grad_rows: Vec<F>,
    /// Gradients of a tile's queries, `[channel][lane]`.
    query_grad: Vec<F::Sum>,
    /// Probabilities and scores of a chunk, `[key][lane]`, then their gradients.
    probabilities: Vec<F::Sum>,
    scores: Vec<F::Sum>,
    /// The same, packed for products.
    packed: Vec<F>,
    chunk: Chunk<'p>,
}

impl<F: Lane> BackwardScratch<'_, F> {
    fn new(problem: &Problem) -> Self {
        let lanes = vec![F::default(); problem.head_dim.div_ceil(F::WIDTH) * LANES];
        let rows = vec![F::default(); row_width(problem.head_dim) * LANES / F::WIDTH];
        let chunk = vec![F::Sum::ZERO; chunk_rows::<F>() * LANES];
        Self {
            query: lanes.clone(),
            grad: lanes,
            query_rows: rows.clone(),
            grad_rows: rows,
            query_grad: vec![F::Sum::ZERO; problem.head_dim * LANES],
            probabilities: chunk.clone(),
            scores: chunk,
            packed: Vec::new(),
            chunk: Chunk::default(),
        }
    }
}

/// One head. `'p` is the lifetime of the problem, which workspaces borrow for longer than a head.
struct BackwardHead<'a, 'p, E, F> {
    problem: &'p Problem,
    entry: usize,
    query: HeadView<'a, E>,
    out: HeadView<'a, E>,
    grad: HeadView<'a, E>,
    /// Packed along the channels.
    keys: Vec<F>,
    values: Vec<F>,
    /// Packed along the tokens; empty where lanes are single values and packing is the same.
    key_columns: Vec<F>,
    scales: &'a [[f64; 2]],
}

impl<'a, 'p, E: Element, F: Lane<Sum = E::Work>> BackwardHead<'a, 'p, E, F> {
    fn new(problem: &'p Problem, inputs: &BackwardInputs<'a, E>, index: usize) -> Self {
        let queries = |values| HeadView::new(values, problem, problem.queries, index);
        let [key, value] = [inputs.key, inputs.value].map(|values| HeadView::new(values, problem, problem.keys, index));
        let mut keys = Vec::new();
        let mut values = Vec::new();
        let mut key_columns = Vec::new();
        key.rows(&mut keys);
        value.rows(&mut values);
        if F::WIDTH > 1 {
            key.columns(&mut key_columns);
        }
        Self {
            problem,
            entry: index / problem.heads,
            query: queries(inputs.query),
            out: queries(inputs.out),
            grad: queries(inputs.grad),
            keys,
            values,
            key_columns,
            scales: &inputs.scales[index * problem.queries..][..problem.queries],
        }
    }

    /// Divides the query tiles into parts, each with its slice of `query_out`, (queries, head_dim).
    fn parts<'h>(&'h self, mut query_out: &'h mut [E]) -> Vec<TileRange<'h, 'a, 'p, E, F>> {
        let Problem { batch, heads, head_dim, .. } = *self.problem;
        let tiles = &self.problem.tiles;
        let count = JOBS.div_ceil(batch * heads).min(tiles.len() / MIN_TILES).max(1);
        let take_part = |tiles: &'p [QueryTile]| {
            let queries: usize = tiles.iter().map(|tile| tile.queries.len()).sum();
            let (out, rest) = std::mem::take(&mut query_out).split_at_mut(queries * head_dim);
            query_out = rest;
            TileRange { head: self, tiles, query_out: out }
        };
        tiles.chunks(tiles.len().div_ceil(count)).map(take_part).collect()
    }
}

/// A part: consecutive query tiles of a head.
struct TileRange<'h, 'a, 'p, E, F> {
    head: &'h BackwardHead<'a, 'p, E, F>,
    tiles: &'p [QueryTile],
    query_out: &'h mut [E],
}

impl<'p, E: Element, F: Lane<Sum = E::Work>> TileRange<'_, '_, 'p, E, F> {
    /// Differentiates the tiles, and returns the sums of their keys.
    fn run(
        mut self,
        scratches: &Workspaces<BackwardScratch<'p, F>>,
        sums: &Workspaces<KeySums<E::Work>>,
    ) -> KeySums<E::Work> {
        let problem = self.head.problem;
        let mut scratch = scratches.take(|| BackwardScratch::new(problem));
        let mut sums = sums.take(KeySums::default);
        sums.clear(problem, self.tiles);
        let mut chunk = std::mem::take(&mut scratch.chunk);
        for tile in self.tiles {
            let statistics = self.head.load(&mut scratch, tile);
            for_chunks::<F>(&mut chunk, problem.visits(self.head.entry, tile), |chunk| {
                self.head.differentiate(&mut scratch, chunk, &statistics);
                self.head.accumulate(&mut scratch, &mut sums, chunk);
            });
            self.store(&scratch.query_grad, tile);
        }
        scratches.give(BackwardScratch { chunk, ..scratch });
        sums
    }

    /// Writes the gradients of the queries of `tile`.
    fn store(&mut self, query_grad: &[E::Work], tile: &QueryTile) {
        let head_dim = self.head.problem.head_dim;
        let (out, rest) = std::mem::take(&mut self.query_out).split_at_mut(tile.queries.len() * head_dim);
        self.query_out = rest;
        for (lane, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let values = query_grad[lane..].iter().step_by(LANES);
            out.iter_mut().zip(values).for_each(|(out, value)| *out = E::store(*value));
        }
    }
}

/// For each query the maximum and 1 / sum of its softmax, and delta = Σ out · grad (FlashAttention-2, algorithm 2).
struct Statistics<T> {
    max: [T; LANES],
    inverse_sum: [T; LANES],
    delta: [T; LANES],
}

impl<E: Element, F: Lane<Sum = E::Work>> BackwardHead<'_, '_, E, F> {
    /// Packs the queries and gradients of `tile`, and computes its statistics.
    fn load(&self, scratch: &mut BackwardScratch<F>, tile: &QueryTile) -> Statistics<E::Work> {
        load_lanes(&mut scratch.query, self.query, tile);
        load_lanes(&mut scratch.grad, self.grad, tile);
        load_rows(&mut scratch.query_rows, self.query, tile);
        load_rows(&mut scratch.grad_rows, self.grad, tile);
        scratch.query_grad.fill(E::Work::ZERO);
        let zeros = [E::Work::ZERO; LANES];
        let mut statistics = Statistics { max: zeros, inverse_sum: zeros, delta: zeros };
        for (lane, token) in tile.queries.clone().enumerate() {
            [statistics.max[lane], statistics.inverse_sum[lane]] = self.scales[token].map(E::Work::cast);
            // In f64, because its error is added to all gradients of scores alike and does not average out.
            let products =
                self.out.row(token).iter().zip(self.grad.row(token)).map(|(out, grad)| out.to_f64() * grad.to_f64());
            statistics.delta[lane] = E::Work::cast(products.sum());
        }
        statistics
    }

    /// Computes probabilities and gradients of scores for a chunk of keys.
    fn differentiate(&self, scratch: &mut BackwardScratch<F>, chunk: &Chunk<'_>, statistics: &Statistics<E::Work>) {
        let count = chunk.rows * LANES;
        let features = self.problem.features;
        let probabilities = &mut scratch.probabilities[..count];
        let scores = &mut scratch.scores[..count];
        // Rows without a key get probability 0, and gradient 0 as long as the other factor is finite.
        probabilities.fill(E::Work::MINUS_INFINITY);
        scores.fill(E::Work::ZERO);
        score(probabilities, &self.keys, chunk, &scratch.query, features);
        mask_scores(probabilities, chunk, features);
        score(scores, &self.values, chunk, &scratch.grad, features);
        features.run(SoftmaxBackward { probabilities, scores, statistics, scale: self.problem.scale() });
    }

    /// Adds what a chunk contributes to the gradients of queries, keys and values.
    fn accumulate(&self, scratch: &mut BackwardScratch<F>, sums: &mut KeySums<E::Work>, chunk: &Chunk<'_>) {
        let BackwardScratch { query_rows, grad_rows, query_grad, probabilities, scores, packed, .. } = scratch;
        let probabilities = &probabilities[..chunk.rows * LANES];
        let scores = &scores[..chunk.rows * LANES];
        let columns = if F::WIDTH > 1 { &self.key_columns } else { &self.keys };
        let features = self.problem.features;
        add_weighted(query_grad, columns, chunk, F::pack_across_rows(scores, LANES, packed, features), features);
        let scatter = Scatter { chunk, features };
        scatter.add(sums, |sums| &mut sums.key, F::pack_along_rows(scores, packed, features), query_rows);
        scatter.add(sums, |sums| &mut sums.value, F::pack_along_rows(probabilities, packed, features), grad_rows);
    }
}

/// Turns products q k into probabilities p, and grad · value into the gradients of those products,
/// scale · p · (grad · value - delta).
struct SoftmaxBackward<'a, T> {
    probabilities: &'a mut [T],
    scores: &'a mut [T],
    statistics: &'a Statistics<T>,
    scale: f64,
}

impl<T: Real> SimdKernel for SoftmaxBackward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let Statistics { max, inverse_sum, delta } = self.statistics;
        let scale = T::Vector::<L>::splat(T::cast(self.scale));
        let negated_max = negated::<T, L>(load_row::<T, L>(max));
        let inverse_sum = load_row::<T, L>(inverse_sum);
        let delta = load_row::<T, L>(delta);
        let rows = self.probabilities.chunks_exact_mut(LANES).zip(self.scores.chunks_exact_mut(LANES));
        for (probabilities, scores) in rows {
            let mut p = load_row::<T, L>(probabilities);
            let mut score_grad = load_row::<T, L>(scores);
            for vector in 0..VECTORS {
                p[vector] = p[vector].times_plus(scale, negated_max[vector]).exponential().times(inverse_sum[vector]);
                score_grad[vector] = p[vector].times(scale).times(score_grad[vector].minus(delta[vector]));
            }
            store_row::<T, L>(p, probabilities);
            store_row::<T, L>(score_grad, scores);
        }
    }
}

/// Adds products over the queries of a tile to sums of the keys of a chunk.
struct Scatter<'a, 'p> {
    chunk: &'a Chunk<'p>,
    features: CpuFeatures,
}

impl Scatter<'_, '_> {
    /// `sums[key][channel] += Σ weights[key][lane] · rows[lane][channel]`, where `select` is the sums of keys or those of
    /// values.
    fn add<F: Lane>(
        &self,
        sums: &mut KeySums<F::Sum>,
        select: fn(&mut KeySums<F::Sum>) -> &mut [F::Sum],
        weights: &[F],
        rows: &[F],
    ) {
        let lanes = 0..LANES / F::WIDTH;
        let width = rows.len() / lanes.len();
        for run in &self.chunk.runs {
            let a = Strided { values: &weights[run.row * lanes.len()..], row_step: lanes.len(), inner_step: 1 };
            let rows_of_a = run.keys.len();
            let inner = std::slice::from_ref(&lanes);
            let first = sums.row_of(run.keys.start) * width;
            for channel in (0..width).step_by(LANES) {
                let product = MatrixProduct { rows: rows_of_a, inner, a, b: &rows[channel..], b_step: width };
                product.add_to(&mut select(sums)[first + channel..], width, self.features);
            }
        }
    }
}

/// Packs the rows of `tile` as `out[lane / WIDTH][channel]`. Lanes without a query are 0.
fn load_rows<E: Element, F: Lane<Sum = E::Work>>(out: &mut [F], view: HeadView<'_, E>, tile: &QueryTile) {
    out.fill(F::default());
    let width = out.len() / (LANES / F::WIDTH);
    for (out, token) in out.chunks_exact_mut(width).zip(tile.queries.clone().step_by(F::WIDTH)) {
        let second = (F::WIDTH > 1 && token + 1 < tile.queries.end).then(|| view.row(token + 1));
        F::pack_two_rows(view.row(token), second, out);
    }
}

/// (batch · heads, tokens, head_dim) to (batch, tokens, heads, head_dim).
fn tokens_first<E: Element>(values: &[E], problem: &Problem, tokens: usize) -> Vec<E> {
    let Problem { heads, head_dim, .. } = *problem;
    let mut out = vec![E::zero(); values.len()];
    out.par_chunks_mut(heads * head_dim).enumerate().for_each(|(row, out)| {
        let entry = row / tokens;
        let token = row % tokens;
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            out.copy_from_slice(&values[((entry * heads + head) * tokens + token) * head_dim..][..head_dim]);
        }
    });
    out
}
