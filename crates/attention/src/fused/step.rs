//! What forward and backward share: one head's keys and values, 32 queries as lanes, and their scores over a chunk of
//! keys.

use super::problem::{Problem, QueryTile, Visit};
use super::product::{Product, Strided, load_row, store_row};
use crate::tiles::LANES;
use clearform_ops::simd::{self, Element, Level, Real, Task, Vector, dispatch};
use rayon::prelude::*;
use std::ops::Range;

/// Keys that are scored at a time: their rows of 128 values and the scores stay in the nearer caches.
pub(super) const CHUNK: usize = 48;

/// One head of a (batch, tokens, heads, head_dim) tensor.
#[derive(Clone, Copy)]
pub(super) struct HeadView<'a, E> {
    values: &'a [E],
    tokens: usize,
    heads: usize,
    head_dim: usize,
    index: usize,
}

impl<'a, E: Element> HeadView<'a, E> {
    /// Head `index` of all batch entries together: entry · heads + head.
    pub fn new(values: &'a [E], problem: &Problem, tokens: usize, index: usize) -> Self {
        Self { values, tokens, heads: problem.heads, head_dim: problem.head_dim, index }
    }

    /// The values of a token.
    #[inline(always)]
    pub fn row(&self, token: usize) -> &'a [E] {
        let (entry, head) = (self.index / self.heads, self.index % self.heads);
        &self.values[((entry * self.tokens + token) * self.heads + head) * self.head_dim..][..self.head_dim]
    }

    /// All tokens, one after the other.
    pub fn packed(&self) -> Vec<E::Work> {
        let mut packed = Vec::with_capacity(self.tokens * self.head_dim);
        for token in 0..self.tokens {
            packed.extend(self.row(token).iter().map(|value| value.load()));
        }
        packed
    }
}

/// Writes the rows of `tile` side by side, times `scale`: out[channel][lane]. Lanes without a query are 0.
pub(super) fn load_lanes<E: Element>(out: &mut [E::Work], view: HeadView<'_, E>, tile: &QueryTile, scale: f64) {
    out.fill(E::Work::ZERO);
    let scale = E::Work::of(scale);
    for (lane, token) in tile.queries.clone().enumerate() {
        for (out, value) in out[lane..].iter_mut().step_by(LANES).zip(view.row(token)) {
            *out = value.load() * scale;
        }
    }
}

/// Chunks of what `tile` visits.
pub(super) fn chunks<'a>(
    problem: &'a Problem,
    entry: usize,
    tile: &'a QueryTile,
) -> impl Iterator<Item = Visit<'a>> + 'a {
    problem.visits(entry, tile).flat_map(|Visit { tokens, seen }| {
        let first = tokens.start;
        tokens.clone().step_by(CHUNK).map(move |start| {
            let end = tokens.end.min(start + CHUNK);
            Visit { tokens: start..end, seen: if seen.is_empty() { seen } else { &seen[start - first..end - first] } }
        })
    })
}

/// scores[key][lane] = Σ rows(key, channel) · lanes[channel][lane], for `rows` (tokens, head_dim) of one head.
pub(super) fn score<T: Real>(scores: &mut [T], rows: &[T], keys: &Range<usize>, lanes: &[T]) {
    let head_dim = lanes.len() / LANES;
    scores[..keys.len() * LANES].fill(T::ZERO);
    let a = Strided { values: &rows[keys.start * head_dim..], row_step: head_dim, inner_step: 1 };
    Product { rows: keys.len(), inner: head_dim, a, b: lanes, b_step: LANES }.add_to(scores, LANES);
}

/// out[channel][lane] += Σ rows(key, channel) · weights[key][lane].
pub(super) fn gather<T: Real>(out: &mut [T], rows: &[T], keys: &Range<usize>, weights: &[T]) {
    let head_dim = out.len() / LANES;
    let a = Strided { values: &rows[keys.start * head_dim..], row_step: 1, inner_step: head_dim };
    Product { rows: head_dim, inner: keys.len(), a, b: weights, b_step: LANES }.add_to(out, LANES);
}

/// Sets scores of queries that do not see a key to -∞.
pub(super) fn hide<T: Real>(scores: &mut [T], seen: &[u32]) {
    if !seen.is_empty() {
        dispatch(Hide { scores, seen });
    }
}

struct Hide<'a, T> {
    scores: &'a mut [T],
    seen: &'a [u32],
}

impl<T: Real> Task for Hide<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self) {
        for (scores, seen) in self.scores.chunks_exact_mut(LANES).zip(self.seen) {
            let mut row = load_row::<T, L>(scores);
            for (vector, lanes) in row.iter_mut().enumerate() {
                *lanes = lanes.keep((seen >> (vector * simd::LANES)) as u16);
            }
            store_row::<T, L>(row, scores);
        }
    }
}

/// (batch · heads, tokens, head_dim) to (batch, tokens, heads, head_dim).
pub(super) fn tokens_first<E: Element>(values: &[E], problem: &Problem, tokens: usize) -> Vec<E> {
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
