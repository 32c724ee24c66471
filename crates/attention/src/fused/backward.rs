//! The backward: probabilities are computed again from each query's scale. Its main function is [`backward`].
//!
//! Query tiles are differentiated in parts that threads take, each with its own sums for keys and values. How many parts
//! there are depends on the problem alone and their sums are added in order, so any number of threads gives the same
//! bits. Keys in an order of their own, as on a GPU, would need their scores computed once more.

use super::forward::negative;
use super::problem::{Problem, QueryTile};
use super::scores::{Chunk, HeadView, chunk_rows, for_chunks, gather, hide, load_lanes, score};
use super::sums::{KeySums, row, total};
use super::workspaces::Workspaces;
use crate::tiles::LANES;
use clearform_ops::simd::{
    CpuFeatures, Element, Isa, Lane, MatrixProduct, Real, SimdKernel, Strided, VECTORS, Vector, load_row, store_row,
};
use rayon::prelude::*;

/// Jobs that keep the threads busy, heads and parts of them together.
const JOBS: usize = 16;

/// Query tiles that a part has at least: adding up its sums costs little beside them.
const LEAST: usize = 16;

/// What the forward was given and gave, and the gradient of what it gave.
pub(super) struct BackwardInputs<'a, E> {
    pub query: &'a [E],
    pub key: &'a [E],
    pub value: &'a [E],
    pub out: &'a [E],
    pub grad: &'a [E],
    /// Maximum of each query's scores and 1 / Σ exp(score - maximum), (batch · heads, queries). Their sum in one number,
    /// the log-sum-exp, would be rounded to where f32 loses a digit of every probability.
    pub scales: &'a [[f64; 2]],
}

/// Gradients of query, key and value, by products of `F`.
///
/// # Shapes
/// Those of the forward.
pub(super) fn backward<E: Element, F: Lane<Sum = E::Work>>(
    problem: &Problem,
    given: &BackwardInputs<'_, E>,
) -> [Vec<E>; 3] {
    let heads = problem.batch * problem.heads;
    let zeros = |count: usize| vec![E::zero(); heads * count];
    let (mut query, mut key, mut value) =
        (zeros(problem.query_count()), zeros(problem.key_count()), zeros(problem.key_count()));
    backward_into::<E, F>(problem, given, [&mut query, &mut key, &mut value]);
    [
        tokens_first(&query, problem, problem.queries),
        tokens_first(&key, problem, problem.keys),
        tokens_first(&value, problem, problem.keys),
    ]
}

/// The same, over whatever stands in the outputs.
///
/// # Shapes
/// outputs (batch · heads, tokens, head_dim).
pub(super) fn backward_into<E: Element, F: Lane<Sum = E::Work>>(
    problem: &Problem,
    given: &BackwardInputs<'_, E>,
    [query, key, value]: [&mut [E]; 3],
) {
    let (scratch, sums) = (&Workspaces::new(), &Workspaces::new());
    let query = query.par_chunks_mut(problem.query_count());
    let outputs = query.zip(key.par_chunks_mut(problem.key_count())).zip(value.par_chunks_mut(problem.key_count()));
    outputs.enumerate().for_each(|(index, ((query, key), value))| {
        let head = BackwardHead::<E, F>::new(problem, given, index);
        let parts: Vec<_> = head.parts(query).into_par_iter().map(|part| part.run(scratch, sums)).collect();
        total(&parts, |sums| &sums.key, problem.head_dim, key);
        total(&parts, |sums| &sums.value, problem.head_dim, value);
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
    /// Of a chunk, `[key][lane]`.
    probabilities: Vec<F::Sum>,
    scores: Vec<F::Sum>,
    /// What of them is multiplied.
    factors: Vec<F>,
    chunk: Chunk<'p>,
}

impl<F: Lane> BackwardScratch<'_, F> {
    fn new(problem: &Problem) -> Self {
        let lanes = vec![F::default(); problem.head_dim.div_ceil(F::WIDTH) * LANES];
        let rows = vec![F::default(); row(problem.head_dim) * LANES / F::WIDTH];
        let chunk = vec![F::Sum::ZERO; chunk_rows::<F>() * LANES];
        Self {
            query: lanes.clone(),
            grad: lanes,
            query_rows: rows.clone(),
            grad_rows: rows,
            query_grad: vec![F::Sum::ZERO; problem.head_dim * LANES],
            probabilities: chunk.clone(),
            scores: chunk,
            factors: Vec::new(),
            chunk: Chunk::default(),
        }
    }
}

/// `'p` is the problem's life, which working memory that outlives a head refers to.
struct BackwardHead<'a, 'p, E, F> {
    problem: &'p Problem,
    entry: usize,
    query: HeadView<'a, E>,
    out: HeadView<'a, E>,
    grad: HeadView<'a, E>,
    /// Factors along the channels.
    keys: Vec<F>,
    values: Vec<F>,
    /// Factors along the tokens, where those are others.
    key_columns: Vec<F>,
    scales: &'a [[f64; 2]],
}

impl<'a, 'p, E: Element, F: Lane<Sum = E::Work>> BackwardHead<'a, 'p, E, F> {
    fn new(problem: &'p Problem, given: &BackwardInputs<'a, E>, index: usize) -> Self {
        let queries = |values| HeadView::new(values, problem, problem.queries, index);
        let [key, value] = [given.key, given.value].map(|values| HeadView::new(values, problem, problem.keys, index));
        let (mut keys, mut values, mut key_columns) = (Vec::new(), Vec::new(), Vec::new());
        key.rows(&mut keys);
        value.rows(&mut values);
        if F::WIDTH > 1 {
            key.columns(&mut key_columns);
        }
        Self {
            problem,
            entry: index / problem.heads,
            query: queries(given.query),
            out: queries(given.out),
            grad: queries(given.grad),
            keys,
            values,
            key_columns,
            scales: &given.scales[index * problem.queries..][..problem.queries],
        }
    }

    /// Its query tiles in parts, each with its gradients of queries, (queries, head_dim).
    fn parts<'h>(&'h self, mut query_out: &'h mut [E]) -> Vec<TileRange<'h, 'a, 'p, E, F>> {
        let Problem { batch, heads, head_dim, .. } = *self.problem;
        let tiles = &self.problem.tiles;
        let count = JOBS.div_ceil(batch * heads).min(tiles.len() / LEAST).max(1);
        let part = |tiles: &'p [QueryTile]| {
            let queries: usize = tiles.iter().map(|tile| tile.queries.len()).sum();
            let (out, rest) = std::mem::take(&mut query_out).split_at_mut(queries * head_dim);
            query_out = rest;
            TileRange { head: self, tiles, query_out: out }
        };
        tiles.chunks(tiles.len().div_ceil(count)).map(part).collect()
    }
}

/// Query tiles of a head that one job takes.
struct TileRange<'h, 'a, 'p, E, F> {
    head: &'h BackwardHead<'a, 'p, E, F>,
    tiles: &'p [QueryTile],
    query_out: &'h mut [E],
}

impl<'p, E: Element, F: Lane<Sum = E::Work>> TileRange<'_, '_, 'p, E, F> {
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
                self.head.collect(&mut scratch, &mut sums, chunk);
            });
            self.store(&scratch.query_grad, tile);
        }
        scratches.give(BackwardScratch { chunk, ..scratch });
        sums
    }

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

/// Per query: the scale of its softmax, and Σ out · grad, which is the gradient of the softmax's denominator.
struct Statistics<T> {
    max: [T; LANES],
    factor: [T; LANES],
    delta: [T; LANES],
}

impl<E: Element, F: Lane<Sum = E::Work>> BackwardHead<'_, '_, E, F> {
    fn load(&self, scratch: &mut BackwardScratch<F>, tile: &QueryTile) -> Statistics<E::Work> {
        load_lanes(&mut scratch.query, self.query, tile);
        load_lanes(&mut scratch.grad, self.grad, tile);
        load_rows(&mut scratch.query_rows, self.query, tile);
        load_rows(&mut scratch.grad_rows, self.grad, tile);
        scratch.query_grad.fill(E::Work::ZERO);
        let zeros = [E::Work::ZERO; LANES];
        let mut statistics = Statistics { max: zeros, factor: zeros, delta: zeros };
        for (lane, token) in tile.queries.clone().enumerate() {
            [statistics.max[lane], statistics.factor[lane]] = self.scales[token].map(E::Work::of);
            // In f64, because what is subtracted from all scores alike does not average out.
            let products =
                self.out.row(token).iter().zip(self.grad.row(token)).map(|(out, grad)| out.to_f64() * grad.to_f64());
            statistics.delta[lane] = E::Work::of(products.sum());
        }
        statistics
    }

    fn differentiate(&self, scratch: &mut BackwardScratch<F>, chunk: &Chunk<'_>, statistics: &Statistics<E::Work>) {
        let (count, features) = (chunk.rows * LANES, self.problem.features);
        let (probabilities, scores) = (&mut scratch.probabilities[..count], &mut scratch.scores[..count]);
        // Rows without a key have no share, and so no slope if nothing infinite is multiplied with it.
        probabilities.fill(E::Work::MINUS_INFINITY);
        scores.fill(E::Work::ZERO);
        score(probabilities, &self.keys, chunk, &scratch.query, features);
        hide(probabilities, chunk, features);
        score(scores, &self.values, chunk, &scratch.grad, features);
        features.run(SoftmaxBackward { probabilities, scores, statistics, scale: self.problem.scale() });
    }

    fn collect(&self, scratch: &mut BackwardScratch<F>, sums: &mut KeySums<E::Work>, chunk: &Chunk<'_>) {
        let BackwardScratch { query_rows, grad_rows, query_grad, probabilities, scores, factors, .. } = scratch;
        let (probabilities, scores) = (&probabilities[..chunk.rows * LANES], &scores[..chunk.rows * LANES]);
        let columns = if F::WIDTH > 1 { &self.key_columns } else { &self.keys };
        let features = self.problem.features;
        gather(query_grad, columns, chunk, F::along_columns(scores, LANES, factors, features), features);
        let scatter = Scatter { chunk, features };
        scatter.add(sums, |sums| &mut sums.key, F::along_rows(scores, factors, features), query_rows);
        scatter.add(sums, |sums| &mut sums.value, F::along_rows(probabilities, factors, features), grad_rows);
    }
}

/// Turns products q k into probabilities p, and grad · value into the gradients of the products,
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
        let Statistics { max, factor, delta } = self.statistics;
        let scale = T::Vector::<L>::splat(T::of(self.scale));
        let (lowered, factor) = (negative::<T, L>(load_row::<T, L>(max)), load_row::<T, L>(factor));
        let delta = load_row::<T, L>(delta);
        let rows = self.probabilities.chunks_exact_mut(LANES).zip(self.scores.chunks_exact_mut(LANES));
        for (probabilities, scores) in rows {
            let (mut shares, mut slopes) = (load_row::<T, L>(probabilities), load_row::<T, L>(scores));
            for vector in 0..VECTORS {
                shares[vector] = shares[vector].times_plus(scale, lowered[vector]).exponential().times(factor[vector]);
                slopes[vector] = shares[vector].times(scale).times(slopes[vector].minus(delta[vector]));
            }
            store_row::<T, L>(shares, probabilities);
            store_row::<T, L>(slopes, scores);
        }
    }
}

struct Scatter<'a, 'p> {
    chunk: &'a Chunk<'p>,
    features: CpuFeatures,
}

impl Scatter<'_, '_> {
    /// sums[key][channel] += Σ weights[key][lane] · rows[lane][channel]; `of` picks the sums.
    fn add<F: Lane>(
        &self,
        sums: &mut KeySums<F::Sum>,
        of: fn(&mut KeySums<F::Sum>) -> &mut [F::Sum],
        weights: &[F],
        rows: &[F],
    ) {
        let lanes = 0..LANES / F::WIDTH;
        let width = rows.len() / lanes.len();
        for piece in &self.chunk.pieces {
            let a = Strided { values: &weights[piece.row * lanes.len()..], row_step: lanes.len(), inner_step: 1 };
            let (rows_of_a, inner) = (piece.keys.len(), std::slice::from_ref(&lanes));
            let first = sums.place(piece.keys.start) * width;
            for channel in (0..width).step_by(LANES) {
                let product = MatrixProduct { rows: rows_of_a, inner, a, b: &rows[channel..], b_step: width };
                product.add_to(&mut of(sums)[first + channel..], width, self.features);
            }
        }
    }
}

/// Writes the rows of `tile` one after the other: `out[lane / WIDTH][channel]`. Lanes without a query are 0.
fn load_rows<E: Element, F: Lane<Sum = E::Work>>(out: &mut [F], view: HeadView<'_, E>, tile: &QueryTile) {
    out.fill(F::default());
    let width = out.len() / (LANES / F::WIDTH);
    for (out, token) in out.chunks_exact_mut(width).zip(tile.queries.clone().step_by(F::WIDTH)) {
        let second = (F::WIDTH > 1 && token + 1 < tile.queries.end).then(|| view.row(token + 1));
        F::across(view.row(token), second, out);
    }
}

/// (batch · heads, tokens, head_dim) to (batch, tokens, heads, head_dim).
fn tokens_first<E: Element>(values: &[E], problem: &Problem, tokens: usize) -> Vec<E> {
    let Problem { heads, head_dim, .. } = *problem;
    let mut out = vec![E::zero(); values.len()];
    out.par_chunks_mut(heads * head_dim).enumerate().for_each(|(row, out)| {
        let (entry, token) = (row / tokens, row % tokens);
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            out.copy_from_slice(&values[((entry * heads + head) * tokens + token) * head_dim..][..head_dim]);
        }
    });
    out
}
