//! [`panels`]: products of f32 in the 16 registers of AVX2.
//!
//! The general panel has room for two rows of accumulators there, whose multiply-adds wait for each other and for
//! loads. Three rows use 12 registers for accumulators, three for the left operand and one for 8 lanes of the right
//! operand.

use super::matrix::{MatrixProduct, ROW};
use std::arch::x86_64::*;

/// Rows of a panel.
const ROWS: usize = 3;

/// Registers of a row.
const PARTS: usize = ROW / 8;

/// Computes rows of `product` three at a time, and returns the first that is left. A single row is slow by itself, so
/// that four rows are left to panels of two rather than one.
///
/// # Safety
/// The processor has AVX2 and FMA, and `checked_count` has checked the product.
#[inline(always)]
pub(super) unsafe fn panels<const ADD: bool>(
    product: &MatrixProduct<'_, f32>,
    out: &mut [f32],
    out_step: usize,
) -> usize {
    let left = if product.rows % ROWS == 1 { ROWS + 1 } else { product.rows % ROWS };
    let end = product.rows.saturating_sub(left);
    for first in (0..end).step_by(ROWS) {
        // SAFETY: `first` and the two rows after it are rows of the product; the rest is the caller's promise.
        let sums = unsafe { panel(product, first) };
        for row in 0..ROWS {
            let out = &mut out[(first + row) * out_step..][..ROW];
            for (out, sums) in out.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
                // SAFETY: the caller's promise; a reference to 8 values can be read and written whole.
                unsafe {
                    let old = if ADD { _mm256_loadu_ps(out.as_ptr()) } else { _mm256_setzero_ps() };
                    _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(sums[row], old));
                }
            }
        }
    }
    end
}

/// `Σ a(row, inner) · b[inner][lane]` of three rows, as `[8 lanes][row]`.
///
/// # Safety
/// As for [`panels`], and three rows from `first` on are rows of the product.
#[inline(always)]
unsafe fn panel(product: &MatrixProduct<'_, f32>, first: usize) -> [[__m256; ROWS]; PARTS] {
    let MatrixProduct { a, b, b_step, .. } = product;
    // SAFETY: the caller's promise: every row and inner index is inside `a`, and `b` has a row for each inner index.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); ROWS]; PARTS];
        let mut lanes = b.as_ptr();
        for run in product.inner {
            let mut at = a.values.as_ptr().wrapping_add(first * a.row_step + run.start * a.inner_step);
            for _ in run.clone() {
                let broadcast = |row: usize| _mm256_broadcast_ss(&*at.add(row * a.row_step));
                let left = [broadcast(0), broadcast(1), broadcast(2)];
                for (part, sums) in sums.iter_mut().enumerate() {
                    let lanes = _mm256_loadu_ps(lanes.add(8 * part));
                    for row in 0..ROWS {
                        sums[row] = _mm256_fmadd_ps(left[row], lanes, sums[row]);
                    }
                }
                at = at.wrapping_add(a.inner_step);
                lanes = lanes.wrapping_add(*b_step);
            }
        }
        sums
    }
}
