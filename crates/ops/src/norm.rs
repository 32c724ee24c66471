//! Norms over the last dimension in one pass: [`modulated_layer_norm`], [`rms_norm`], [`rms_norm_rope`].

mod layer;
mod rms;

pub use layer::modulated_layer_norm;
pub use rms::{rms_norm, rms_norm_rope};

use crate::simd::Real;

/// Accumulators of a sum: fixed, so that sums vectorize and are the same with every instruction set.
const LANES: usize = 16;

/// Σ f(a, b, c) over three rows.
#[inline(always)]
fn sum_over<E: Copy, T: Real>([a, b, c]: [&[E]; 3], f: impl Fn(E, E, E) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let chunks = (a.chunks_exact(LANES), b.chunks_exact(LANES), c.chunks_exact(LANES));
    let rest = (chunks.0.remainder(), chunks.1.remainder(), chunks.2.remainder());
    for (((lane, a), b), c) in lanes.iter_mut().zip(rest.0).zip(rest.1).zip(rest.2) {
        *lane = f(*a, *b, *c);
    }
    for ((a, b), c) in chunks.0.zip(chunks.1).zip(chunks.2) {
        for lane in 0..LANES {
            lanes[lane] += f(a[lane], b[lane], c[lane]);
        }
    }
    lanes.into_iter().fold(T::ZERO, |sum, lane| sum + lane)
}
