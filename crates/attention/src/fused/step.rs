//! What forward and backward share: one head's keys and values, 32 queries as lanes, and their scores over a chunk of
//! keys.

use super::problem::{Problem, QueryTile, Visit};
use crate::tiles::LANES;
use clearform_ops::simd::{
    self, Element, Factor, Level, Product, Real, Strided, Task, Vector, dispatch, load_row, store_row,
};
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

    /// All tokens as rows of factors along the channels.
    ///
    /// # Shapes
    /// (tokens, head_dim / WIDTH).
    pub fn rows<F: Factor<Sum = E::Work>>(&self) -> Vec<F> {
        let mut rows = Vec::with_capacity(self.tokens * self.head_dim.div_ceil(F::WIDTH));
        for token in 0..self.tokens {
            rows.extend(self.row(token).chunks(F::WIDTH).map(factor::<E, F>));
        }
        rows
    }

    /// All tokens as factors along the tokens.
    ///
    /// # Shapes
    /// (tokens / WIDTH, head_dim).
    pub fn columns<F: Factor<Sum = E::Work>>(&self) -> Vec<F> {
        let mut columns = Vec::with_capacity(self.tokens.div_ceil(F::WIDTH) * self.head_dim);
        for first in (0..self.tokens).step_by(F::WIDTH) {
            let second = if F::WIDTH > 1 && first + 1 < self.tokens { self.row(first + 1) } else { &[] };
            let pair = |(channel, value): (usize, &E)| {
                F::of([value.load(), second.get(channel).map_or(E::Work::ZERO, |value| value.load())].into_iter())
            };
            columns.extend(self.row(first).iter().enumerate().map(pair));
        }
        columns
    }
}

fn factor<E: Element, F: Factor<Sum = E::Work>>(numbers: &[E]) -> F {
    F::of(numbers.iter().map(|number| number.load()))
}

/// Writes the rows of `tile` side by side: out[channel / WIDTH][lane]. Lanes without a query are 0.
pub(super) fn load_lanes<E: Element, F: Factor<Sum = E::Work>>(out: &mut [F], view: HeadView<'_, E>, tile: &QueryTile) {
    out.fill(F::default());
    for (lane, token) in tile.queries.clone().enumerate() {
        for (out, numbers) in out[lane..].iter_mut().step_by(LANES).zip(view.row(token).chunks(F::WIDTH)) {
            *out = factor(numbers);
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

/// scores[key][lane] = Σ rows(key, channel) · lanes[channel][lane], for [`HeadView::rows`] of one head.
pub(super) fn score<F: Factor>(scores: &mut [F::Sum], rows: &[F], keys: &Range<usize>, lanes: &[F]) {
    let steps = lanes.len() / LANES;
    scores[..keys.len() * LANES].fill(F::Sum::ZERO);
    let a = Strided { values: &rows[keys.start * steps..], row_step: steps, inner_step: 1 };
    Product { rows: keys.len(), inner: steps, a, b: lanes, b_step: LANES }.add_to(scores, LANES);
}

/// out[channel][lane] += Σ columns(key, channel) · weights[key][lane], for [`HeadView::columns`] of one head; `weights`
/// begin at the factor that holds `first`.
pub(super) fn gather<F: Factor>(out: &mut [F::Sum], columns: &[F], first: usize, weights: &[F]) {
    let head_dim = out.len() / LANES;
    let a = Strided { values: &columns[first / F::WIDTH * head_dim..], row_step: 1, inner_step: head_dim };
    Product { rows: head_dim, inner: weights.len() / LANES, a, b: weights, b_step: LANES }.add_to(out, LANES);
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
