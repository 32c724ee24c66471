//! [`MatrixProduct`]: the operands of a product, 32 lanes wide.

use super::vector::LANES;
use std::ops::Range;

/// Lanes of a row: two vectors. Each broadcast value of the left operand is used for both, so that loads do not hold
/// back the multiply-adds.
pub const ROW: usize = 32;

/// Vectors of a row.
pub const VECTORS: usize = ROW / LANES;

/// A strided matrix: element (row, inner) is at row · row_step + inner · inner_step.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a, F> {
    /// The elements.
    pub values: &'a [F],
    /// Stride from one row to the next.
    pub row_step: usize,
    /// Stride from one inner index to the next.
    pub inner_step: usize,
}

/// Operands of `out[row][lane] += Σ a(row, inner) · b[inner][lane]`.
#[derive(Debug)]
pub struct MatrixProduct<'a, F> {
    /// Rows of `a` and of the output.
    pub rows: usize,
    /// Inner indices of `a` that are summed over, run by run. The first meets the first row of `b`, the next the
    /// second, and so on.
    pub inner: &'a [Range<usize>],
    /// The left operand, (rows, inner).
    pub a: Strided<'a, F>,
    /// The right operand: rows of 32 lanes, `b_step` apart.
    pub b: &'a [F],
    /// Stride from one row of `b` to the next.
    pub b_step: usize,
}

impl<F> MatrixProduct<'_, F> {
    /// The number of inner indices, or none where a slice is too short. Sizes and strides come from safe callers and
    /// guard unsafe reads, so no sum or product of them may wrap around.
    pub(super) fn checked_count(&self) -> Option<usize> {
        let count = self.inner.iter().try_fold(0usize, |count, run| count.checked_add(run.len()))?;
        let (Some(last_row), Some(last)) = (self.rows.checked_sub(1), count.checked_sub(1)) else { return Some(count) };
        let last_inner = self.inner.iter().map(|run| run.end).max()?.checked_sub(1)?;
        let last_of_row = last_row.checked_mul(self.a.row_step)?;
        let end_of_a = last_of_row.checked_add(last_inner.checked_mul(self.a.inner_step)?)?.checked_add(1)?;
        let end_of_b = last.checked_mul(self.b_step)?.checked_add(ROW)?;
        (end_of_a <= self.a.values.len() && end_of_b <= self.b.len()).then_some(count)
    }
}
