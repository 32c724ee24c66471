//! [`panels`]: products of f32 in the 16 registers of AVX2. Knows no operation.
//!
//! Vectors of 16 lanes leave room for two rows of sums there, whose multiply-adds wait for each other and for loads. Three
//! rows fill the registers, if no more than 8 lanes of the right side are in one at a time.

use super::{MatrixProduct, ROW};
use std::arch::x86_64::*;

/// Rows whose sums are in registers together.
const ROWS: usize = 3;

/// Registers that hold a row's lanes.
const PARTS: usize = ROW / 8;

/// Computes rows of `product` three by three, unless one would be left alone; gives back the first that is left.
///
/// # Safety
/// The processor has AVX2 and FMA, and `checked_count` found the product's extents inside its slices.
#[inline(always)]
pub(super) unsafe fn panels<const ADD: bool>(
    product: &MatrixProduct<'_, f32>,
    out: &mut [f32],
    out_step: usize,
) -> usize {
    let left = if product.rows % ROWS == 1 { ROWS + 1 } else { product.rows % ROWS };
    let end = product.rows.saturating_sub(left);
    for first in (0..end).step_by(ROWS) {
        // SAFETY: `first` and the two rows after it are the product's; the caller's promise.
        let sums = unsafe { panel(product, first) };
        for row in 0..ROWS {
            let out = &mut out[(first + row) * out_step..][..ROW];
            for (out, sums) in out.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
                // SAFETY: the caller's promise; a reference to 8 numbers can be read and written whole.
                unsafe {
                    let old = if ADD { _mm256_loadu_ps(out.as_ptr()) } else { _mm256_setzero_ps() };
                    _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(sums[row], old));
                }
            }
        }
    }
    end
}

/// Σ a(row, inner) · b[inner][lane] of three rows, 8 lanes after the other.
///
/// # Safety
/// As of [`panels`], and three rows from `first` on are the product's.
#[inline(always)]
unsafe fn panel(product: &MatrixProduct<'_, f32>, first: usize) -> [[__m256; ROWS]; PARTS] {
    let MatrixProduct { a, b, b_step, .. } = product;
    // SAFETY: the caller's promise: every row and inner index lies inside `a`, and as many rows of 32 lanes inside `b`.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); ROWS]; PARTS];
        let mut lanes = b.as_ptr();
        for run in product.inner {
            let mut at = a.values.as_ptr().wrapping_add(first * a.row_step + run.start * a.inner_step);
            for _ in run.clone() {
                let factor = |row: usize| _mm256_broadcast_ss(&*at.add(row * a.row_step));
                let factors = [factor(0), factor(1), factor(2)];
                for (part, sums) in sums.iter_mut().enumerate() {
                    let lanes = _mm256_loadu_ps(lanes.add(8 * part));
                    for row in 0..ROWS {
                        sums[row] = _mm256_fmadd_ps(factors[row], lanes, sums[row]);
                    }
                }
                at = at.wrapping_add(a.inner_step);
                lanes = lanes.wrapping_add(*b_step);
            }
        }
        sums
    }
}
