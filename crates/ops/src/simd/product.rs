//! [`Product`]: the matrix product that all of ours are made of, 32 lanes wide. Knows no operation.

use super::{Factor, LANES, Level, Real, Task, Vector, dispatch};
use std::ops::Range;

/// Lanes of a row: two vectors. Each broadcast factor is used for both, so that loads do not hold back the
/// multiply-adds.
pub const ROW: usize = 32;

/// Vectors that hold a row's lanes.
pub const VECTORS: usize = ROW / LANES;

/// The lanes of one row in registers. Loops over it are written out: a closure would be compiled without the wider
/// instructions.
pub type Row<T, L> = [<T as Real>::Vector<L>; VECTORS];

/// A matrix inside a slice: element (row, inner) stands at row · row_step + inner · inner_step.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a, F> {
    /// The slice.
    pub values: &'a [F],
    /// From one row to the next.
    pub row_step: usize,
    /// From one inner index to the next.
    pub inner_step: usize,
}

/// `out[row][lane] += Σ a(row, inner) · b[inner][lane]`.
#[derive(Debug)]
pub struct Product<'a, F> {
    /// Rows of `a` and of the output.
    pub rows: usize,
    /// Inner indices of `a` that are summed over, run by run; they meet the rows of `b` one after the other.
    pub inner: &'a [Range<usize>],
    /// The left side, (rows, inner).
    pub a: Strided<'a, F>,
    /// The right side: rows of 32 lanes, `b_step` apart.
    pub b: &'a [F],
    /// From one inner index to the next.
    pub b_step: usize,
}

impl<F: Factor> Product<'_, F> {
    /// Adds to rows of 32 lanes of `out`, `out_step` apart.
    ///
    /// # Panics
    /// A slice is too short for the extents.
    pub fn add_to(self, out: &mut [F::Sum], out_step: usize) {
        dispatch(Sum::<F, true> { product: self, out, out_step });
    }

    /// Writes rows of 32 lanes of `out`, `out_step` apart.
    ///
    /// # Panics
    /// A slice is too short for the extents.
    pub fn write_to(self, out: &mut [F::Sum], out_step: usize) {
        dispatch(Sum::<F, false> { product: self, out, out_step });
    }
}

struct Sum<'a, F: Factor, const ADD: bool> {
    product: Product<'a, F>,
    out: &'a mut [F::Sum],
    out_step: usize,
}

impl<F: Factor, const ADD: bool> Task for Sum<'_, F, ADD> {
    type Output = ();

    const PAIRS: bool = F::WIDTH > 1;

    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { product, out, out_step } = self;
        let count: usize = product.inner.iter().map(|run| run.len()).sum();
        if product.rows == 0 || ADD && count == 0 {
            return;
        }
        let Strided { values, row_step, inner_step } = product.a;
        let end = product.inner.iter().map(|run| run.end).max().unwrap_or(0);
        assert!(count == 0 || (product.rows - 1) * row_step + (end - 1) * inner_step < values.len());
        assert!(count == 0 || (count - 1) * product.b_step + ROW <= product.b.len());
        let mut row = 0;
        if L::WIDE {
            row = product.panels::<L, ADD, 12>(row, out, out_step);
            row = product.panels::<L, ADD, 4>(row, out, out_step);
        }
        row = product.panels::<L, ADD, 2>(row, out, out_step);
        product.panels::<L, ADD, 1>(row, out, out_step);
    }
}

impl<F: Factor> Product<'_, F> {
    /// As many panels of `ROWS` as there are; gives back the first row that is left.
    #[inline(always)]
    fn panels<L: Level, const ADD: bool, const ROWS: usize>(
        &self,
        mut row: usize,
        out: &mut [F::Sum],
        out_step: usize,
    ) -> usize {
        while row + ROWS <= self.rows {
            self.panel::<L, ADD, ROWS>(row, &mut out[row * out_step..], out_step);
            row += ROWS;
        }
        row
    }

    #[inline(always)]
    fn panel<L: Level, const ADD: bool, const ROWS: usize>(&self, first: usize, out: &mut [F::Sum], out_step: usize) {
        let mut sums = [[Vector::splat(F::Sum::ZERO); VECTORS]; ROWS];
        let mut b_row = self.b.as_ptr();
        for run in self.inner {
            for inner in run.clone() {
                let at = first * self.a.row_step + inner * self.a.inner_step;
                // SAFETY: `run` asserted that `b` holds as many rows as there are inner indices.
                let b: &[[F; LANES]; VECTORS] = unsafe { &*b_row.cast() };
                b_row = b_row.wrapping_add(self.b_step);
                let b = [F::load::<L>(&b[0]), F::load::<L>(&b[1])];
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: `run` asserted that the last row of the largest inner index is inside.
                    let a = F::splat::<L>(unsafe { *self.a.values.get_unchecked(at + row * self.a.row_step) });
                    for vector in 0..VECTORS {
                        sums[vector] = F::multiply_add::<L>(a, b[vector], sums[vector]);
                    }
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            let out = &mut out[row * out_step..][..ROW];
            if ADD {
                add_row::<F::Sum, L>(sums, out);
            } else {
                store_row::<F::Sum, L>(sums, out);
            }
        }
    }
}

/// The lanes of one row.
#[inline(always)]
pub fn load_row<T: Real, L: Level>(row: &[T]) -> Row<T, L> {
    let mut vectors = [T::Vector::<L>::splat(T::ZERO); VECTORS];
    for (vector, part) in vectors.iter_mut().zip(row.as_chunks().0) {
        *vector = T::Vector::<L>::load(part);
    }
    vectors
}

/// Writes the lanes of one row.
#[inline(always)]
pub fn store_row<T: Real, L: Level>(vectors: Row<T, L>, row: &mut [T]) {
    for (vector, part) in vectors.into_iter().zip(row.as_chunks_mut().0) {
        vector.store(part);
    }
}

/// Adds to the lanes of one row.
#[inline(always)]
pub fn add_row<T: Real, L: Level>(mut vectors: Row<T, L>, row: &mut [T]) {
    let old = load_row::<T, L>(row);
    for vector in 0..VECTORS {
        vectors[vector] = vectors[vector].plus(old[vector]);
    }
    store_row::<T, L>(vectors, row);
}
