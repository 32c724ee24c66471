//! The backward: probabilities are computed again from each query's scale, head by head. Its main function is
//! [`backward`].

use super::forward::negative;
use super::problem::{Problem, QueryTile};
use super::step::{Chunk, HeadView, chunk_rows, for_chunks, gather, hide, load_lanes, score};
use crate::tiles::LANES;
use clearform_ops::simd::{
    Element, Factor, Level, Product, Real, Strided, Task, VECTORS, Vector, dispatch, load_row, store_row,
};
use rayon::prelude::*;

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

/// Gradients of query, key and value, by products of `F`.
///
/// # Shapes
/// Those of the forward.
pub(super) fn backward<E: Element, F: Factor<Sum = E::Work>>(problem: &Problem, given: &Given<'_, E>) -> [Vec<E>; 3] {
    let heads = problem.batch * problem.heads;
    let (query_count, key_count) = (problem.query_count(), problem.key_count());
    let mut query = vec![E::zero(); heads * query_count];
    let mut key = vec![E::zero(); heads * key_count];
    let mut value = vec![E::zero(); heads * key_count];
    let outputs =
        query.par_chunks_mut(query_count).zip(key.par_chunks_mut(key_count)).zip(value.par_chunks_mut(key_count));
    outputs.enumerate().for_each(|(index, ((query, key), value))| {
        let mut scratch = Scratch::new(problem);
        Head::<E, F>::new(problem, given, index, query, &mut scratch).run();
        scratch.store(problem.head_dim, key, value);
    });
    [
        tokens_first(&query, problem, problem.queries),
        tokens_first(&key, problem, problem.keys),
        tokens_first(&value, problem, problem.keys),
    ]
}

/// Working memory of a head. Rows of channels are padded to whole vectors.
struct Scratch<F: Factor> {
    /// Queries and gradients of a tile, `[channel / WIDTH][lane]`.
    query: Vec<F>,
    grad: Vec<F>,
    /// The same, `[lane / WIDTH][channel]`.
    query_rows: Vec<F>,
    grad_rows: Vec<F>,
    /// Gradients of a tile's queries, `[channel][lane]`, and of all keys and values, `[token][channel]`.
    query_grad: Vec<F::Sum>,
    key_grad: Vec<F::Sum>,
    value_grad: Vec<F::Sum>,
    /// Of a chunk, `[key][lane]`.
    probabilities: Vec<F::Sum>,
    scores: Vec<F::Sum>,
    /// What of them is multiplied.
    factors: Vec<F>,
}

impl<F: Factor> Scratch<F> {
    fn new(problem: &Problem) -> Self {
        let lanes = vec![F::default(); problem.head_dim.div_ceil(F::WIDTH) * LANES];
        let width = problem.head_dim.next_multiple_of(LANES);
        let rows = vec![F::default(); width * LANES / F::WIDTH];
        let keys = vec![F::Sum::ZERO; width * problem.keys];
        let chunk = vec![F::Sum::ZERO; chunk_rows::<F>() * LANES];
        Self {
            query: lanes.clone(),
            grad: lanes,
            query_rows: rows.clone(),
            grad_rows: rows,
            query_grad: vec![F::Sum::ZERO; problem.head_dim * LANES],
            key_grad: keys.clone(),
            value_grad: keys,
            probabilities: chunk.clone(),
            scores: chunk,
            factors: Vec::new(),
        }
    }

    fn store<E: Element<Work = F::Sum>>(&self, head_dim: usize, key: &mut [E], value: &mut [E]) {
        let width = head_dim.next_multiple_of(LANES);
        for (out, from) in [(key, &self.key_grad), (value, &self.value_grad)] {
            for (out, from) in out.chunks_exact_mut(head_dim).zip(from.chunks_exact(width)) {
                out.iter_mut().zip(from).for_each(|(out, from)| *out = E::store(*from));
            }
        }
    }
}

struct Head<'a, E: Element, F: Factor> {
    problem: &'a Problem,
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
    query_out: &'a mut [E],
    scratch: &'a mut Scratch<F>,
}

impl<'a, E: Element, F: Factor<Sum = E::Work>> Head<'a, E, F> {
    fn new(
        problem: &'a Problem,
        given: &'a Given<'a, E>,
        index: usize,
        query_out: &'a mut [E],
        scratch: &'a mut Scratch<F>,
    ) -> Self {
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
            query_out,
            scratch,
        }
    }

    fn run(mut self) {
        let problem = self.problem;
        for tile in &problem.tiles {
            let statistics = self.load(tile);
            for_chunks::<F>(problem.visits(self.entry, tile), |chunk| {
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

impl<E: Element, F: Factor<Sum = E::Work>> Head<'_, E, F> {
    fn load(&mut self, tile: &QueryTile) -> Statistics<E::Work> {
        load_lanes(&mut self.scratch.query, self.query, tile);
        load_lanes(&mut self.scratch.grad, self.grad, tile);
        load_rows(&mut self.scratch.query_rows, self.query, tile);
        load_rows(&mut self.scratch.grad_rows, self.grad, tile);
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
        let count = chunk.rows * LANES;
        let (probabilities, scores) = (&mut scratch.probabilities[..count], &mut scratch.scores[..count]);
        // Rows without a key have no share, and so no slope if nothing infinite is multiplied with it.
        probabilities.fill(E::Work::MINUS_INFINITY);
        scores.fill(E::Work::ZERO);
        score(probabilities, &self.keys, chunk, &scratch.query);
        hide(probabilities, chunk);
        score(scores, &self.values, chunk, &scratch.grad);
        dispatch(Differentiate { probabilities, scores, statistics, scale: self.problem.scale() });
    }

    fn collect(&mut self, chunk: &Chunk<'_>) {
        let Scratch { query_rows, grad_rows, query_grad, key_grad, value_grad, probabilities, scores, factors, .. } =
            &mut *self.scratch;
        let (probabilities, scores) = (&probabilities[..chunk.rows * LANES], &scores[..chunk.rows * LANES]);
        let columns = if F::WIDTH > 1 { &self.key_columns } else { &self.keys };
        gather(query_grad, columns, chunk, F::along_columns(scores, LANES, factors));
        scatter(key_grad, F::along_rows(scores, factors), chunk, query_rows);
        scatter(value_grad, F::along_rows(probabilities, factors), chunk, grad_rows);
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
fn scatter<F: Factor>(out: &mut [F::Sum], weights: &[F], chunk: &Chunk<'_>, rows: &[F]) {
    let lanes = 0..LANES / F::WIDTH;
    let width = rows.len() / lanes.len();
    for piece in &chunk.pieces {
        let a = Strided { values: &weights[piece.row * lanes.len()..], row_step: lanes.len(), inner_step: 1 };
        let (rows_of_a, inner) = (piece.keys.len(), std::slice::from_ref(&lanes));
        for channel in (0..width).step_by(LANES) {
            let out = &mut out[piece.keys.start * width + channel..];
            Product { rows: rows_of_a, inner, a, b: &rows[channel..], b_step: width }.add_to(out, width);
        }
    }
}

/// Writes the rows of `tile` one after the other: `out[lane / WIDTH][channel]`. Lanes without a query are 0.
fn load_rows<E: Element, F: Factor<Sum = E::Work>>(out: &mut [F], view: HeadView<'_, E>, tile: &QueryTile) {
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
