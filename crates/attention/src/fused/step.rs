//! What forward and backward share: one head's keys and values, 16 queries as lanes, and their scores over a chunk of
//! keys.

use super::problem::{Problem, QueryTile};
use super::product::{Product, Strided};
use crate::tiles::{Cover, KeyRange, LANES};
use clearform_ops::simd::{Element, Level, Real, Task, dispatch};
use rayon::prelude::*;
use std::ops::Range;

/// Keys that are scored at a time: their rows of 128 values and the scores fit the nearest cache.
pub(super) const CHUNK: usize = 32;

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
        (0..self.tokens).flat_map(|token| self.row(token)).map(|value| value.load()).collect()
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
) -> impl Iterator<Item = (Range<usize>, Cover)> + 'a {
    problem.visits(entry, tile).flat_map(|KeyRange { tokens, cover }| {
        let end = tokens.end;
        tokens.step_by(CHUNK).map(move |start| (start..end.min(start + CHUNK), cover))
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

/// Rows and columns of a tile's queries. Lanes without a query stand where the first one does.
pub(super) struct LanePlaces {
    rows: [i32; LANES],
    columns: [i32; LANES],
}

impl LanePlaces {
    /// Text queries have no place and see whole ranges alone.
    pub fn new(problem: &Problem, tile: &QueryTile) -> Self {
        let mut places = Self { rows: [0; LANES], columns: [0; LANES] };
        if let Some(first) = tile.queries.start.checked_sub(problem.places.first) {
            for lane in 0..LANES {
                let token = if lane < tile.queries.len() { first + lane } else { first };
                places.rows[lane] = problem.places.rows[token];
                places.columns[lane] = problem.places.columns[token];
            }
        }
        places
    }

    /// Sets scores of keys outside the disc to -∞.
    pub fn hide<T: Real>(&self, scores: &mut [T], problem: &Problem, keys: &Range<usize>) {
        let places = keys.start - problem.places.first..keys.end - problem.places.first;
        let (rows, columns) = (&problem.places.rows[places.clone()], &problem.places.columns[places]);
        dispatch(Hide { scores, queries: self, rows, columns, limit: problem.limit });
    }
}

struct Hide<'a, T> {
    scores: &'a mut [T],
    queries: &'a LanePlaces,
    rows: &'a [i32],
    columns: &'a [i32],
    limit: i32,
}

impl<T: Real> Task for Hide<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self) {
        let keys = self.rows.iter().zip(self.columns);
        for (scores, (row, column)) in self.scores.chunks_exact_mut(LANES).zip(keys) {
            for (lane, score) in scores.iter_mut().enumerate() {
                let (dy, dx) = (self.queries.rows[lane] - row, self.queries.columns[lane] - column);
                let outside = dy * dy + dx * dx >= self.limit;
                *score = if outside { T::MINUS_INFINITY } else { *score };
            }
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
