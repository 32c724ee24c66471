//! [`KeySums`]: gradients of keys and values as some of the query tiles add them up. Knows no kernel.

use super::problem::{Problem, QueryTile};
use crate::tiles::LANES;
use clearform_ops::simd::{Element, Real};
use rayon::prelude::*;
use std::ops::Range;

/// Keys whose sums one thread adds up at a time.
const BLOCK: usize = 256;

/// The widest row of sums.
const WIDEST: usize = 256;

/// Sums for the keys that some query tiles visit, `[key][channel]`, of keys and of values. Rows of channels are padded to
/// whole vectors.
#[derive(Default)]
pub(super) struct KeySums<T> {
    /// Tokens of the image that have sums; all of the text and of pooled context have.
    image: Range<usize>,
    /// Where in the sequence the image begins and ends.
    whole: Range<usize>,
    pub key: Vec<T>,
    pub value: Vec<T>,
}

impl<T: Real> KeySums<T> {
    /// Sets all to 0, for keys that `tiles` visit.
    pub fn clear(&mut self, problem: &Problem, tiles: &[QueryTile]) {
        self.whole = problem.text()..problem.image_end();
        self.image = problem.image_keys(tiles);
        let left_out = self.whole.len() - self.image.len();
        for sums in [&mut self.key, &mut self.value] {
            sums.clear();
            sums.resize((problem.keys - left_out) * row(problem.head_dim), T::ZERO);
        }
    }

    /// The row of sums of a key, which has some.
    pub fn place(&self, key: usize) -> usize {
        if key < self.whole.start {
            key
        } else if key < self.whole.end {
            key - (self.image.start - self.whole.start)
        } else {
            key - (self.whole.len() - self.image.len())
        }
    }

    /// Whether a key has sums.
    fn holds(&self, key: usize) -> bool {
        !self.whole.contains(&key) || self.image.contains(&key)
    }
}

/// Numbers of a row of sums.
pub(super) fn row(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// Writes the totals of `parts`, added in their order, which makes them the same for any number of threads. `of` picks
/// the sums.
///
/// # Shapes
/// out (keys, head_dim).
pub(super) fn total<E: Element>(
    parts: &[KeySums<E::Work>],
    of: fn(&KeySums<E::Work>) -> &[E::Work],
    head_dim: usize,
    out: &mut [E],
) {
    let width = row(head_dim);
    out.par_chunks_mut(BLOCK * head_dim).enumerate().for_each(|(block, out)| {
        for (key, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let key = block * BLOCK + key;
            let mut total = [E::Work::ZERO; WIDEST];
            for part in parts.iter().filter(|part| part.holds(key)) {
                let sums = &of(part)[part.place(key) * width..][..head_dim];
                total.iter_mut().zip(sums).for_each(|(total, sum)| *total += *sum);
            }
            out.iter_mut().zip(total).for_each(|(out, total)| *out = E::store(total));
        }
    });
}
