//! [`strided_product`] and [`block_product`]: products in f32 by the crate `gemm`, which candle uses too. candle asks the system for the
//! number of processors before each product, which takes longer than a small one.

use rayon::current_num_threads;
use rayon::prelude::*;

/// A matrix in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StridedMatrix<'a> {
    pub values: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    /// Elements from a row to the next, and from a column to the next.
    pub strides: [usize; 2],
}

impl<'a> StridedMatrix<'a> {
    /// A row-major matrix.
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { values, rows, columns, strides: [columns, 1] }
    }

    /// The same values, transposed.
    pub fn transposed(self) -> Self {
        let Self { values, rows, columns, strides: [row, column] } = self;
        Self { values, rows: columns, columns: rows, strides: [column, row] }
    }

    /// The values of [`Self::transposed`] of a row-major matrix, row by row.
    pub fn transposed_values(self) -> Vec<f32> {
        /// Columns that are copied together: a cache line of each row.
        const COLUMNS: usize = 16;
        let Self { values, rows, columns, .. } = self;
        let mut out = vec![0.0; rows * columns];
        out.par_chunks_mut((COLUMNS * rows).max(1)).enumerate().for_each(|(part, out)| {
            let first = part * COLUMNS;
            for (row, values) in values.chunks_exact(columns).enumerate() {
                out[row..].iter_mut().step_by(rows).zip(&values[first..]).for_each(|(out, value)| *out = *value);
            }
        });
        out
    }

    /// Whether every element lies within the values.
    fn is_inside(self) -> bool {
        let last = (self.rows - 1) * self.strides[0] + (self.columns - 1) * self.strides[1];
        last < self.values.len()
    }
}

/// a b, row-major.
///
/// # Panics
/// Shapes that do not match, or matrices that are larger than their values.
pub(crate) fn strided_product(a: StridedMatrix<'_>, b: StridedMatrix<'_>) -> Vec<f32> {
    let mut out = vec![0.0; a.rows * b.columns];
    strided_product_to(&mut out, b.columns, a, b);
    out
}

/// Writes a b to `out`, whose rows begin `step` elements apart. With no columns of a it leaves `out` as it is.
///
/// # Panics
/// As [`strided_product`], or `out` is too short.
pub(crate) fn strided_product_to(out: &mut [f32], step: usize, a: StridedMatrix<'_>, b: StridedMatrix<'_>) {
    if a.rows == 0 || b.columns == 0 || a.columns == 0 {
        return;
    }
    assert!(a.columns == b.rows && a.is_inside() && b.is_inside());
    assert!(step >= b.columns && (a.rows - 1) * step + b.columns <= out.len());
    let [a_row, a_column] = a.strides.map(|stride| stride as isize);
    let [b_row, b_column] = b.strides.map(|stride| stride as isize);
    // SAFETY: all elements of a, b and out lie within their values, as checked above.
    unsafe {
        ::gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            step as isize,
            false,
            a.values.as_ptr(),
            a_column,
            a_row,
            b.values.as_ptr(),
            b_column,
            b_row,
            0.0,
            1.0,
            false,
            false,
            false,
            ::gemm::Parallelism::Rayon(current_num_threads()),
        );
    }
}

/// out = out · keep + a b · scale on this thread, with out (rows, columns), a (rows, inner) and b (inner, columns), all
/// row-major.
pub(crate) fn block_product(
    out: &mut [f32],
    [rows, inner, columns]: [usize; 3],
    a: &[f32],
    b: &[f32],
    [keep, scale]: [f32; 2],
) {
    assert!(out.len() == rows * columns && a.len() == rows * inner && b.len() == inner * columns);
    // SAFETY: the matrices have exactly these sizes.
    unsafe {
        ::gemm::gemm(
            rows,
            columns,
            inner,
            out.as_mut_ptr(),
            1,
            columns as isize,
            keep != 0.0,
            a.as_ptr(),
            1,
            inner as isize,
            b.as_ptr(),
            1,
            columns as isize,
            keep,
            scale,
            false,
            false,
            false,
            ::gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_transposed() {
        let values: Vec<f32> = (0..5 * 37).map(|value| value as f32).collect();
        let matrix = StridedMatrix::new(&values, 5, 37);
        let transposed = matrix.transposed_values();
        assert_eq!(transposed[3 * 5 + 2], values[2 * 37 + 3]);
        assert_eq!(StridedMatrix::new(&transposed, 37, 5).transposed_values(), values);
    }

    #[test]
    fn transposed_factors_give_the_product_by_hand() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // 2 x 3
        let b = [1.0, 0.0, -1.0, 2.0, 1.0, 1.0]; // 3 x 2
        let [left, right] = [StridedMatrix::new(&a, 2, 3), StridedMatrix::new(&b, 3, 2)];
        assert_eq!(strided_product(left, right), [2.0, 7.0, 5.0, 16.0]);
        // (a b)ᵀ = bᵀ aᵀ
        assert_eq!(strided_product(right.transposed(), left.transposed()), [2.0, 5.0, 7.0, 16.0]);
        let empty = StridedMatrix::new(&[], 2, 0);
        assert_eq!(strided_product(empty, StridedMatrix::new(&[], 0, 2)), [0.0; 4]);
    }
}
