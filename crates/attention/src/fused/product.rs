//! [`Product`]: the one matrix product that forward and backward are made of, 32 lanes wide. Knows no attention.

use crate::tiles::LANES;
use clearform_ops::simd::{self, Level, Real, Task, Vector, dispatch};

/// Vectors that hold a row's lanes. Each broadcast number is used for all of them, so that loads do not hold back the
/// multiply-adds.
pub(super) const VECTORS: usize = LANES / simd::LANES;

/// The lanes of one row in registers. Loops over it are written out: a closure would be compiled without the wider
/// instructions.
pub(super) type Row<T, L> = [<T as Real>::Vector<L>; VECTORS];

/// A matrix inside a slice: element (row, inner) stands at row · row_step + inner · inner_step.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a, T> {
    pub values: &'a [T],
    pub row_step: usize,
    pub inner_step: usize,
}

/// out[row][lane] += Σ a(row, inner) · b[inner][lane].
pub(super) struct Product<'a, T> {
    pub rows: usize,
    pub inner: usize,
    pub a: Strided<'a, T>,
    /// Rows of 32 lanes, `b_step` apart.
    pub b: &'a [T],
    pub b_step: usize,
}

impl<T: Real> Product<'_, T> {
    /// Adds to rows of 32 lanes of `out`, `out_step` apart.
    pub fn add_to(self, out: &mut [T], out_step: usize) {
        dispatch(Sum { product: self, out, out_step });
    }
}

struct Sum<'a, T> {
    product: Product<'a, T>,
    out: &'a mut [T],
    out_step: usize,
}

impl<T: Real> Task for Sum<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { product, out, out_step } = self;
        if product.rows == 0 || product.inner == 0 {
            return;
        }
        let Strided { values, row_step, inner_step } = product.a;
        assert!((product.rows - 1) * row_step + (product.inner - 1) * inner_step < values.len());
        assert!((product.inner - 1) * product.b_step + LANES <= product.b.len());
        let mut row = 0;
        if L::WIDE {
            row = product.panels::<L, 12>(row, out, out_step);
            row = product.panels::<L, 4>(row, out, out_step);
        }
        row = product.panels::<L, 2>(row, out, out_step);
        product.panels::<L, 1>(row, out, out_step);
    }
}

impl<T: Real> Product<'_, T> {
    /// As many panels of `ROWS` as there are; gives back the first row that is left.
    #[inline(always)]
    fn panels<L: Level, const ROWS: usize>(&self, mut row: usize, out: &mut [T], out_step: usize) -> usize {
        while row + ROWS <= self.rows {
            self.panel::<L, ROWS>(row, &mut out[row * out_step..], out_step);
            row += ROWS;
        }
        row
    }

    #[inline(always)]
    fn panel<L: Level, const ROWS: usize>(&self, first: usize, out: &mut [T], out_step: usize) {
        let mut sums = [[T::Vector::<L>::splat(T::ZERO); VECTORS]; ROWS];
        for inner in 0..self.inner {
            let at = first * self.a.row_step + inner * self.a.inner_step;
            // SAFETY: `run` asserted that the last inner index, the largest that occurs, is inside.
            let b = load_row::<T, L>(unsafe { self.b.get_unchecked(inner * self.b_step..inner * self.b_step + LANES) });
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: as above, for the last row.
                let a = T::Vector::<L>::splat(unsafe { *self.a.values.get_unchecked(at + row * self.a.row_step) });
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = a.times_plus(b, *sum);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            add_row::<T, L>(sums, &mut out[row * out_step..][..LANES]);
        }
    }
}

/// The lanes of one row.
#[inline(always)]
pub(super) fn load_row<T: Real, L: Level>(row: &[T]) -> Row<T, L> {
    let mut vectors = [T::Vector::<L>::splat(T::ZERO); VECTORS];
    for (vector, part) in vectors.iter_mut().zip(row.as_chunks().0) {
        *vector = T::Vector::<L>::load(part);
    }
    vectors
}

/// Writes the lanes of one row.
#[inline(always)]
pub(super) fn store_row<T: Real, L: Level>(vectors: Row<T, L>, row: &mut [T]) {
    for (vector, part) in vectors.into_iter().zip(row.as_chunks_mut().0) {
        vector.store(part);
    }
}

/// Adds to the lanes of one row.
#[inline(always)]
pub(super) fn add_row<T: Real, L: Level>(mut vectors: Row<T, L>, row: &mut [T]) {
    let old = load_row::<T, L>(row);
    for vector in 0..VECTORS {
        vectors[vector] = vectors[vector].plus(old[vector]);
    }
    store_row::<T, L>(vectors, row);
}
