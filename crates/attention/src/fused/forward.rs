//! The forward: online softmax, tile by tile. Its main function is [`forward`].

use super::problem::{Problem, QueryTile};
use super::step::{CHUNK, HeadView, LanePlaces, chunks, gather, load_lanes, score, tokens_first};
use crate::tiles::{Cover, LANES};
use clearform_ops::simd::{Element, Level, Real, Task, dispatch};
use rayon::prelude::*;
use std::ops::Range;

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
        let places = LanePlaces::new(problem, self.tile);
        let mut online = Online { max: [E::Work::LOWEST; LANES], sum: [E::Work::ZERO; LANES] };
        for (keys, cover) in chunks(problem, self.head.entry, self.tile) {
            self.chunk(&keys, cover, &places, &mut online);
        }
        self.finish(&online);
    }

    fn chunk(&mut self, keys: &Range<usize>, cover: Cover, places: &LanePlaces, online: &mut Online<E::Work>) {
        let scratch = &mut *self.scratch;
        let scores = &mut scratch.scores[..keys.len() * LANES];
        score(scores, &self.head.key, keys, &scratch.query);
        if cover == Cover::Edge {
            places.hide(scores, self.head.problem, keys);
        }
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
        let Online { mut max, mut sum } = *self.online;
        for scores in self.scores.chunks_exact(LANES) {
            for lane in 0..LANES {
                max[lane] = if scores[lane] > max[lane] { scores[lane] } else { max[lane] };
            }
        }
        if max != self.online.max {
            let factors = self.online.factors::<L>(&max);
            (0..LANES).for_each(|lane| sum[lane] *= factors[lane]);
            for out in self.out.chunks_exact_mut(LANES) {
                (0..LANES).for_each(|lane| out[lane] *= factors[lane]);
            }
        }
        for scores in self.scores.chunks_exact_mut(LANES) {
            for lane in 0..LANES {
                scores[lane] = (scores[lane] - max[lane]).exponential::<L>();
                sum[lane] += scores[lane];
            }
        }
        *self.online = Online { max, sum };
    }
}

impl<T: Real> Online<T> {
    /// What sums over the old maximum are worth over the new one.
    #[inline(always)]
    fn factors<L: Level>(&self, max: &[T; LANES]) -> [T; LANES] {
        let mut factors = [T::ONE; LANES];
        for lane in 0..LANES {
            factors[lane] = (self.max[lane] - max[lane]).exponential::<L>();
        }
        factors
    }
}
