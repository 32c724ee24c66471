//! The forward: online softmax, tile by tile. Its main function is [`forward`].

use super::problem::{Problem, QueryTile, Visit};
use super::step::{CHUNK, HeadView, chunks, gather, hide, load_lanes, score, tokens_first};
use crate::tiles::LANES;
use clearform_ops::simd::{
    Element, Factor, Level, Real, Row, Task, VECTORS, Vector, add_row, dispatch, load_row, store_row,
};
use rayon::prelude::*;

/// softmax(q kᵀ / √head_dim) v by products of `F`, and each query's scale: the maximum of its scores, and
/// 1 / Σ exp(score - maximum).
///
/// # Shapes
/// [query, key, value], each (batch, tokens, heads, head_dim) -> as query, and (batch · heads, queries).
pub(super) fn forward<E: Element, F: Factor<Sum = E::Work>>(
    problem: &Problem,
    [query, key, value]: [&[E]; 3],
) -> (Vec<E>, Vec<[E::Work; 2]>) {
    let heads = problem.batch * problem.heads;
    let mut out = vec![E::zero(); heads * problem.query_count()];
    let mut scales = vec![[E::Work::ZERO; 2]; heads * problem.queries];
    let outputs = out.par_chunks_mut(problem.query_count()).zip(scales.par_chunks_mut(problem.queries));
    outputs.enumerate().for_each(|(index, (out, scales))| {
        let query = HeadView::new(query, problem, problem.queries, index);
        let [key, value] = [key, value].map(|values| HeadView::new(values, problem, problem.keys, index));
        let (key, value) = (key.rows::<F>(), value.columns::<F>());
        Head { problem, entry: index / problem.heads, query, key, value }.run(out, scales);
    });
    (tokens_first(&out, problem, problem.queries), scales)
}

struct Head<'a, E: Element, F> {
    problem: &'a Problem,
    entry: usize,
    query: HeadView<'a, E>,
    key: Vec<F>,
    value: Vec<F>,
}

impl<E: Element, F: Factor<Sum = E::Work>> Head<'_, E, F> {
    fn run(&self, mut out: &mut [E], mut scales: &mut [[E::Work; 2]]) {
        let mut parts = Vec::with_capacity(self.problem.tiles.len());
        for tile in &self.problem.tiles {
            let (tile_out, rest) = out.split_at_mut(tile.queries.len() * self.problem.head_dim);
            let (tile_scales, rest_scales) = scales.split_at_mut(tile.queries.len());
            parts.push((tile, tile_out, tile_scales));
            (out, scales) = (rest, rest_scales);
        }
        parts.into_par_iter().for_each_init(
            || Scratch::new(self.problem.head_dim),
            |scratch, (tile, out, scales)| Tile { head: self, tile, out, scales, scratch }.run(),
        );
    }
}

/// Working memory of a thread.
struct Scratch<F: Factor> {
    query: Vec<F>,
    out: Vec<F::Sum>,
    /// Scores of a chunk's keys, after as many rows of zeros as bring its first key to the start of a factor.
    scores: [F::Sum; (CHUNK + 1) * LANES],
    weights: Vec<F>,
}

impl<F: Factor> Scratch<F> {
    fn new(head_dim: usize) -> Self {
        Self {
            query: vec![F::default(); head_dim.div_ceil(F::WIDTH) * LANES],
            out: vec![F::Sum::ZERO; head_dim * LANES],
            scores: [F::Sum::ZERO; (CHUNK + 1) * LANES],
            weights: Vec::new(),
        }
    }
}

/// Maximum and sum so far, query by query.
struct Online<T> {
    max: [T; LANES],
    sum: [T; LANES],
}

struct Tile<'a, E: Element, F: Factor<Sum = E::Work>> {
    head: &'a Head<'a, E, F>,
    tile: &'a QueryTile,
    out: &'a mut [E],
    scales: &'a mut [[E::Work; 2]],
    scratch: &'a mut Scratch<F>,
}

impl<E: Element, F: Factor<Sum = E::Work>> Tile<'_, E, F> {
    fn run(mut self) {
        let problem = self.head.problem;
        load_lanes(&mut self.scratch.query, self.head.query, self.tile);
        self.scratch.out.fill(E::Work::ZERO);
        let mut online = Online { max: [E::Work::LOWEST; LANES], sum: [E::Work::ZERO; LANES] };
        for visit in chunks(problem, self.head.entry, self.tile) {
            self.chunk(&visit, &mut online);
        }
        self.finish(&online);
    }

    fn chunk(&mut self, Visit { tokens: keys, seen }: &Visit<'_>, online: &mut Online<E::Work>) {
        let scratch = &mut *self.scratch;
        let lead = keys.start % F::WIDTH * LANES;
        let rows = &mut scratch.scores[..lead + keys.len() * LANES];
        rows[..lead].fill(E::Work::ZERO);
        let scores = &mut rows[lead..];
        score(scores, &self.head.key, keys, &scratch.query);
        hide(scores, seen);
        dispatch(Admit { online, scores, out: &mut scratch.out, scale: self.head.problem.scale() });
        let weights = F::along_columns(rows, LANES, &mut scratch.weights);
        gather(&mut scratch.out, &self.head.value, keys.start, weights);
    }

    fn finish(&mut self, online: &Online<E::Work>) {
        let head_dim = self.head.problem.head_dim;
        for (lane, out) in self.out.chunks_exact_mut(head_dim).enumerate() {
            let factor = E::Work::ONE / online.sum[lane];
            for (out, value) in out.iter_mut().zip(self.scratch.out[lane..].iter().step_by(LANES)) {
                *out = E::store(*value * factor);
            }
            self.scales[lane] = [online.max[lane], factor];
        }
    }
}

/// Turns products q k into probabilities up to a factor, and brings what was summed so far to the new maximum.
struct Admit<'a, T> {
    online: &'a mut Online<T>,
    scores: &'a mut [T],
    out: &'a mut [T],
    scale: f64,
}

impl<T: Real> Task for Admit<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self) {
        let Online { max: old, sum } = &mut *self.online;
        let scale = T::Vector::<L>::splat(T::of(self.scale));
        let max = largest::<T, L>(load_row::<T, L>(old), self.scores, scale);
        let (factors, grew) = factors::<T, L>(load_row::<T, L>(old), max);
        if grew {
            rescale::<T, L>(sum, factors);
            for out in self.out.chunks_exact_mut(LANES) {
                rescale::<T, L>(out, factors);
            }
        }
        // A chunk is summed by itself: fewer roundings than adding every key to all that came before.
        let mut sums = [T::Vector::<L>::splat(T::ZERO); VECTORS];
        let negative = negative::<T, L>(max);
        for scores in self.scores.chunks_exact_mut(LANES) {
            let mut row = load_row::<T, L>(scores);
            for vector in 0..VECTORS {
                row[vector] = row[vector].times_plus(scale, negative[vector]).exponential();
                sums[vector] = row[vector].plus(sums[vector]);
            }
            store_row::<T, L>(row, scores);
        }
        store_row::<T, L>(max, old);
        add_row::<T, L>(sums, sum);
    }
}

/// The largest of `max` and of the scores, which are `products` times `scale`.
#[inline(always)]
fn largest<T: Real, L: Level>(max: Row<T, L>, products: &[T], scale: T::Vector<L>) -> Row<T, L> {
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

#[inline(always)]
pub(super) fn negative<T: Real, L: Level>(mut row: Row<T, L>) -> Row<T, L> {
    for vector in &mut row {
        *vector = T::Vector::<L>::splat(T::ZERO).minus(*vector);
    }
    row
}

/// What sums over the old maximum are worth over the new one, and whether any maximum grew.
#[inline(always)]
fn factors<T: Real, L: Level>(old: Row<T, L>, max: Row<T, L>) -> (Row<T, L>, bool) {
    let (mut factors, mut grew) = (max, false);
    for vector in 0..VECTORS {
        grew |= max[vector].differs(old[vector]);
        factors[vector] = old[vector].minus(max[vector]).exponential();
    }
    (factors, grew)
}

#[inline(always)]
fn rescale<T: Real, L: Level>(lanes: &mut [T], factors: Row<T, L>) {
    let mut row = load_row::<T, L>(lanes);
    for vector in 0..VECTORS {
        row[vector] = row[vector].times(factors[vector]);
    }
    store_row::<T, L>(row, lanes);
}
