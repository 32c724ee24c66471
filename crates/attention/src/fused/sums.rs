//! [`KeySums`]: the gradients of keys and values that some of the query tiles contribute.

use super::problem::{Problem, QueryTile};
use crate::tiles::LANES;
use clearform_ops::simd::{Element, Real};
use rayon::prelude::*;
use std::ops::Range;

/// Keys per task when sums are added: 256 rows of 128 f32 are 128 KiB of each part.
const BLOCK: usize = 256;

/// The widest row of sums: the largest supported head_dim.
const WIDEST: usize = 256;

/// Gradients `[key][channel]` of the keys and values that some query tiles visit. Rows are padded to whole vectors.
#[derive(Default)]
pub(super) struct KeySums<T> {
    /// Image keys with sums. All text and pooled keys have sums.
    image: Range<usize>,
    /// All image keys.
    whole: Range<usize>,
    pub key: Vec<T>,
    pub value: Vec<T>,
}

impl<T: Real> KeySums<T> {
    /// Sets the sums of the keys that `tiles` visit to 0.
    pub fn clear(&mut self, problem: &Problem, tiles: &[QueryTile]) {
        self.whole = problem.text()..problem.image_end();
        self.image = problem.image_keys(tiles);
        let left_out = self.whole.len() - self.image.len();
        for sums in [&mut self.key, &mut self.value] {
            sums.clear();
            sums.resize((problem.keys - left_out) * row_width(problem.head_dim), T::ZERO);
        }
    }

    /// The row of a key that has sums.
    pub fn row_of(&self, key: usize) -> usize {
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

/// Elements of a row of sums.
pub(super) fn row_width(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// Adds the sums of `parts`, in order, so that totals do not depend on the number of threads. `select` is the sums of
/// keys or those of values.
///
/// # Shapes
/// out (keys, head_dim).
pub(super) fn add_parts<E: Element>(
    parts: &[KeySums<E::Work>],
    select: fn(&KeySums<E::Work>) -> &[E::Work],
    head_dim: usize,
    out: &mut [E],
) {
    let width = row_width(head_dim);
    out.par_chunks_mut(BLOCK * head_dim).enumerate().for_each(|(block, out)| {
        for (key, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let key = block * BLOCK + key;
            let mut add_parts = [E::Work::ZERO; WIDEST];
            for part in parts.iter().filter(|part| part.holds(key)) {
                let sums = &select(part)[part.row_of(key) * width..][..head_dim];
                add_parts.iter_mut().zip(sums).for_each(|(add_parts, sum)| *add_parts += *sum);
            }
            out.iter_mut().zip(add_parts).for_each(|(out, add_parts)| *out = E::store(add_parts));
        }
    });
}
