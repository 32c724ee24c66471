//! The forward: online softmax, tile by tile. Its main function is [`forward`].

use super::problem::{Problem, QueryTile, Visit};
use super::product::{Row, VECTORS, add_row, load_row, store_row};
use super::step::{CHUNK, HeadView, chunks, gather, hide, load_lanes, score, tokens_first};
use crate::tiles::LANES;
use clearform_ops::simd::{Element, Level, Real, Task, Vector, dispatch};
use rayon::prelude::*;

/// softmax(q kᵀ / √head_dim) v, and each query's scale: the maximum of its scores, and
/// 1 / Σ exp(score - maximum).
///
/// # Shapes
/// [query, key, value], each (batch, tokens, heads, head_dim) -> as query, and (batch · heads, queries).
pub(super) fn forward<E: Element>(problem: &Problem, [query, key, value]: [&[E]; 3]) -> (Vec<E>, Vec<[E::Work; 2]>) {
    let heads = problem.batch * problem.heads;
    let mut out = vec![E::zero(); heads * problem.query_count()];
    let mut scales = vec![[E::Work::ZERO; 2]; heads * problem.queries];
    let outputs = out.par_chunks_mut(problem.query_count()).zip(scales.par_chunks_mut(problem.queries));
    outputs.enumerate().for_each(|(index, (out, scales))| {
        let packed = |values| HeadView::new(values, problem, problem.keys, index).packed();
        let query = HeadView::new(query, problem, problem.queries, index);
        Head { problem, entry: index / problem.heads, query, key: packed(key), value: packed(value) }.run(out, scales);
    });
    (tokens_first(&out, problem, problem.queries), scales)
}

struct Head<'a, E: Element> {
    problem: &'a Problem,
    entry: usize,
    query: HeadView<'a, E>,
    key: Vec<E::Work>,
    value: Vec<E::Work>,
}

impl<E: Element> Head<'_, E> {
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
struct Scratch<T> {
    query: Vec<T>,
    out: Vec<T>,
    scores: [T; CHUNK * LANES],
}

impl<T: Real> Scratch<T> {
    fn new(head_dim: usize) -> Self {
        let lanes = vec![T::ZERO; head_dim * LANES];
        Self { query: lanes.clone(), out: lanes, scores: [T::ZERO; CHUNK * LANES] }
    }
}

/// Maximum and sum so far, query by query.
struct Online<T> {
    max: [T; LANES],
    sum: [T; LANES],
}

struct Tile<'a, E: Element> {
    head: &'a Head<'a, E>,
    tile: &'a QueryTile,
    out: &'a mut [E],
    scales: &'a mut [[E::Work; 2]],
    scratch: &'a mut Scratch<E::Work>,
}

impl<E: Element> Tile<'_, E> {
    fn run(mut self) {
        let problem = self.head.problem;
        load_lanes(&mut self.scratch.query, self.head.query, self.tile, 1.0 / (problem.head_dim as f64).sqrt());
        self.scratch.out.fill(E::Work::ZERO);
        let mut online = Online { max: [E::Work::LOWEST; LANES], sum: [E::Work::ZERO; LANES] };
        for visit in chunks(problem, self.head.entry, self.tile) {
            self.chunk(&visit, &mut online);
        }
        self.finish(&online);
    }

    fn chunk(&mut self, Visit { tokens: keys, seen }: &Visit<'_>, online: &mut Online<E::Work>) {
        let scratch = &mut *self.scratch;
        let scores = &mut scratch.scores[..keys.len() * LANES];
        score(scores, &self.head.key, keys, &scratch.query);
        hide(scores, seen);
        dispatch(Admit { online, scores, out: &mut scratch.out });
        gather(&mut scratch.out, &self.head.value, keys, scores);
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

/// Turns scores into probabilities up to a factor, and brings what was summed so far to the new maximum.
struct Admit<'a, T> {
    online: &'a mut Online<T>,
    scores: &'a mut [T],
    out: &'a mut [T],
}

impl<T: Real> Task for Admit<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self) {
        let Online { max: old, sum } = &mut *self.online;
        let max = largest::<T, L>(load_row::<T, L>(old), self.scores);
        let (factors, grew) = factors::<T, L>(load_row::<T, L>(old), max);
        if grew {
            scale::<T, L>(sum, factors);
            for out in self.out.chunks_exact_mut(LANES) {
                scale::<T, L>(out, factors);
            }
        }
        // A chunk is summed by itself: fewer roundings than adding every key to all that came before.
        let mut sums = [T::Vector::<L>::splat(T::ZERO); VECTORS];
        for scores in self.scores.chunks_exact_mut(LANES) {
            let mut row = load_row::<T, L>(scores);
            for vector in 0..VECTORS {
                row[vector] = row[vector].minus(max[vector]).exponential();
                sums[vector] = row[vector].plus(sums[vector]);
            }
            store_row::<T, L>(row, scores);
        }
        store_row::<T, L>(max, old);
        add_row::<T, L>(sums, sum);
    }
}

#[inline(always)]
fn largest<T: Real, L: Level>(mut max: Row<T, L>, scores: &[T]) -> Row<T, L> {
    for scores in scores.chunks_exact(LANES) {
        let row = load_row::<T, L>(scores);
        for vector in 0..VECTORS {
            max[vector] = row[vector].larger(max[vector]);
        }
    }
    max
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
fn scale<T: Real, L: Level>(lanes: &mut [T], factors: Row<T, L>) {
    let mut row = load_row::<T, L>(lanes);
    for vector in 0..VECTORS {
        row[vector] = row[vector].times(factors[vector]);
    }
    store_row::<T, L>(row, lanes);
}
