//! The backward: probabilities are computed again from each query's scale, head by head. Its main function is
//! [`backward`].

use super::forward::negative;
use super::problem::{Problem, QueryTile};
use super::step::{Chunk, HeadView, chunk_rows, for_chunks, gather, hide, load_lanes, score, tokens_first};
use crate::tiles::LANES;
use clearform_ops::simd::{
    Element, Level, Product, Real, Strided, Task, VECTORS, Vector, dispatch, load_row, store_row,
};
use rayon::prelude::*;
use std::ops::Range;

/// What the forward was given and gave, and the gradient of what it gave.
pub(super) struct Given<'a, E> {
    pub query: &'a [E],
    pub key: &'a [E],
    pub value: &'a [E],
    pub out: &'a [E],
    pub grad: &'a [E],
    /// Maximum of each query's scores and 1 / Σ exp(score - maximum), (batch · heads, queries). Their sum in one number,
    /// the log-sum-exp, would be rounded to where f32 loses a digit of every probability.
    pub scales: &'a [[f64; 2]],
}

/// Gradients of query, key and value.
///
/// # Shapes
/// Those of the forward.
pub(super) fn backward<E: Element>(problem: &Problem, given: &Given<'_, E>) -> [Vec<E>; 3] {
    let heads = problem.batch * problem.heads;
    let (query_count, key_count) = (problem.query_count(), problem.key_count());
    let mut query = vec![E::zero(); heads * query_count];
    let mut key = vec![E::zero(); heads * key_count];
    let mut value = vec![E::zero(); heads * key_count];
    let outputs =
        query.par_chunks_mut(query_count).zip(key.par_chunks_mut(key_count)).zip(value.par_chunks_mut(key_count));
    outputs.enumerate().for_each(|(index, ((query, key), value))| {
        let mut scratch = Scratch::new(problem);
        Head::new(problem, given, index, query, &mut scratch).run();
        scratch.store(problem.head_dim, key, value);
    });
    [
        tokens_first(&query, problem, problem.queries),
        tokens_first(&key, problem, problem.keys),
        tokens_first(&value, problem, problem.keys),
    ]
}

/// Working memory of a head. Rows are padded to whole vectors.
struct Scratch<T> {
    /// Queries and gradients of a tile, [channel][lane].
    query: Vec<T>,
    grad: Vec<T>,
    /// The same, [lane][channel].
    query_rows: Vec<T>,
    grad_rows: Vec<T>,
    /// Gradients of a tile's queries, [channel][lane], and of all keys and values, [token][channel].
    query_grad: Vec<T>,
    key_grad: Vec<T>,
    value_grad: Vec<T>,
    probabilities: Vec<T>,
    scores: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new(problem: &Problem) -> Self {
        let lanes = vec![T::ZERO; problem.head_dim * LANES];
        let width = problem.head_dim.next_multiple_of(LANES);
        let rows = vec![T::ZERO; width * LANES];
        let keys = vec![T::ZERO; width * problem.keys];
        Self {
            query: lanes.clone(),
            grad: lanes.clone(),
            query_rows: rows.clone(),
            grad_rows: rows,
            query_grad: lanes,
            key_grad: keys.clone(),
            value_grad: keys,
            probabilities: vec![T::ZERO; chunk_rows::<T>() * LANES],
            scores: vec![T::ZERO; chunk_rows::<T>() * LANES],
        }
    }

    fn store<E: Element<Work = T>>(&self, head_dim: usize, key: &mut [E], value: &mut [E]) {
        let width = head_dim.next_multiple_of(LANES);
        for (out, from) in [(key, &self.key_grad), (value, &self.value_grad)] {
            for (out, from) in out.chunks_exact_mut(head_dim).zip(from.chunks_exact(width)) {
                out.iter_mut().zip(from).for_each(|(out, from)| *out = E::store(*from));
            }
        }
    }
}

struct Head<'a, E: Element> {
    problem: &'a Problem,
    entry: usize,
    query: HeadView<'a, E>,
    out: HeadView<'a, E>,
    grad: HeadView<'a, E>,
    key: Vec<E::Work>,
    value: Vec<E::Work>,
    scales: &'a [[f64; 2]],
    query_out: &'a mut [E],
    scratch: &'a mut Scratch<E::Work>,
}

impl<'a, E: Element> Head<'a, E> {
    fn new(
        problem: &'a Problem,
        given: &'a Given<'a, E>,
        index: usize,
        query_out: &'a mut [E],
        scratch: &'a mut Scratch<E::Work>,
    ) -> Self {
        let queries = |values| HeadView::new(values, problem, problem.queries, index);
        let packed = |values| {
            let mut rows = Vec::new();
            HeadView::new(values, problem, problem.keys, index).rows(&mut rows);
            rows
        };
        Self {
            problem,
            entry: index / problem.heads,
            query: queries(given.query),
            out: queries(given.out),
            grad: queries(given.grad),
            key: packed(given.key),
            value: packed(given.value),
            scales: &given.scales[index * problem.queries..][..problem.queries],
            query_out,
            scratch,
        }
    }

    fn run(mut self) {
        let problem = self.problem;
        for tile in &problem.tiles {
            let statistics = self.load(tile);
            for_chunks::<E::Work>(problem.visits(self.entry, tile), |chunk| {
                self.differentiate(chunk, &statistics);
                self.collect(chunk);
            });
            self.store_queries(tile);
        }
    }
}

/// Per query: the scale of its softmax, and Σ out · grad, which is the gradient of the softmax's denominator.
struct Statistics<T> {
    max: [T; LANES],
    factor: [T; LANES],
    delta: [T; LANES],
}

impl<E: Element> Head<'_, E> {
    fn load(&mut self, tile: &QueryTile) -> Statistics<E::Work> {
        load_lanes(&mut self.scratch.query, self.query, tile);
        load_lanes(&mut self.scratch.grad, self.grad, tile);
        transpose(&self.scratch.query, &mut self.scratch.query_rows);
        transpose(&self.scratch.grad, &mut self.scratch.grad_rows);
        self.scratch.query_grad.fill(E::Work::ZERO);
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

    fn differentiate(&mut self, chunk: &Chunk<'_>, statistics: &Statistics<E::Work>) {
        let scratch = &mut *self.scratch;
        score(&mut scratch.probabilities, &self.key, chunk, &scratch.query);
        hide(&mut scratch.probabilities, chunk);
        score(&mut scratch.scores, &self.value, chunk, &scratch.grad);
        let count = chunk.rows * LANES;
        let (probabilities, scores) = (&mut scratch.probabilities[..count], &mut scratch.scores[..count]);
        dispatch(Differentiate { probabilities, scores, statistics, scale: self.problem.scale() });
    }

    fn collect(&mut self, chunk: &Chunk<'_>) {
        let scratch = &mut *self.scratch;
        gather(&mut scratch.query_grad, &self.key, chunk, &scratch.scores[..chunk.rows * LANES]);
        for piece in &chunk.pieces {
            scatter(&mut scratch.key_grad, piece.scores(&mut scratch.scores), &piece.keys, &scratch.query_rows);
            scatter(&mut scratch.value_grad, piece.scores(&mut scratch.probabilities), &piece.keys, &scratch.grad_rows);
        }
    }

    fn store_queries(&mut self, tile: &QueryTile) {
        for (lane, token) in tile.queries.clone().enumerate() {
            let out = &mut self.query_out[token * self.problem.head_dim..][..self.problem.head_dim];
            for (out, value) in out.iter_mut().zip(self.scratch.query_grad[lane..].iter().step_by(LANES)) {
                *out = E::store(*value);
            }
        }
    }
}

/// Turns products q k into probabilities p, and grad · value into the gradients of the products,
/// scale · p · (grad · value - delta).
struct Differentiate<'a, T> {
    probabilities: &'a mut [T],
    scores: &'a mut [T],
    statistics: &'a Statistics<T>,
    scale: f64,
}

impl<T: Real> Task for Differentiate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self) {
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

/// out[key][channel] += Σ weights[key][lane] · rows[lane][channel].
fn scatter<T: Real>(out: &mut [T], weights: &[T], keys: &Range<usize>, rows: &[T]) {
    let width = rows.len() / LANES;
    let (a, lanes) = (Strided { values: weights, row_step: LANES, inner_step: 1 }, 0..LANES);
    for channel in (0..width).step_by(LANES) {
        let out = &mut out[keys.start * width + channel..];
        Product { rows: keys.len(), inner: std::slice::from_ref(&lanes), a, b: &rows[channel..], b_step: width }
            .add_to(out, width);
    }
}

/// [channel][lane] to [lane][channel].
fn transpose<T: Real>(lanes: &[T], rows: &mut [T]) {
    let width = rows.len() / LANES;
    for (channel, lanes) in lanes.chunks_exact(LANES).enumerate() {
        for (lane, value) in lanes.iter().enumerate() {
            rows[lane * width + channel] = *value;
        }
    }
}
