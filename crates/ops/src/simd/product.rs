//! The matrix product that attention and [`linear`](fn@crate::linear) are made of, 32 lanes wide.

use super::Real;
use super::features::CpuFeatures;
use super::isa::{Isa, SimdKernel};
use super::lane::Lane;
use super::matrix::{MatrixProduct, ROW, VECTORS};
use super::vector::{LANES, Vector};

/// One row in registers. Loops over it are written out, because a closure would be compiled without the wider
/// instructions.
pub type RowLanes<T, L> = [<T as Real>::Vector<L>; VECTORS];

impl<F: Lane> MatrixProduct<'_, F> {
    /// Adds the product to rows of 32 lanes of `out`, `out_step` apart.
    ///
    /// # Panics
    /// A slice is too short.
    pub fn add_to(self, out: &mut [F::Sum], out_step: usize, features: CpuFeatures) {
        features.run(Accumulate::<F, true> { product: self, out, out_step });
    }

    /// Writes the product to rows of 32 lanes of `out`, `out_step` apart.
    ///
    /// # Panics
    /// A slice is too short.
    pub fn write_to(self, out: &mut [F::Sum], out_step: usize, features: CpuFeatures) {
        features.run(Accumulate::<F, false> { product: self, out, out_step });
    }
}

struct Accumulate<'a, F: Lane, const ADD: bool> {
    product: MatrixProduct<'a, F>,
    out: &'a mut [F::Sum],
    out_step: usize,
}

impl<F: Lane, const ADD: bool> SimdKernel for Accumulate<'_, F, ADD> {
    type Output = ();

    const PAIRS: bool = F::WIDTH > 1;

    #[inline(always)]
    fn run<L: Isa>(self) {
        let Self { product, out, out_step } = self;
        let count = product.checked_count();
        assert!(count.is_some(), "a slice is too short for the matrix product");
        if product.rows == 0 || ADD && count == Some(0) {
            return;
        }
        let mut row = F::isa_panels::<L, ADD>(&product, out, out_step);
        // 12 rows of two accumulators, two vectors of b and one of a fill 27 of the 32 registers of AVX-512. Elsewhere
        // a vector is two registers of 16, and two rows need 13 of them.
        if L::WIDE {
            row = product.panels::<L, ADD, 12>(row, out, out_step);
            row = product.panels::<L, ADD, 4>(row, out, out_step);
        }
        row = product.panels::<L, ADD, 2>(row, out, out_step);
        product.panels::<L, ADD, 1>(row, out, out_step);
    }
}

impl<F: Lane> MatrixProduct<'_, F> {
    /// Computes as many panels of `ROWS` rows as fit; returns the first row that is left.
    #[inline(always)]
    fn panels<L: Isa, const ADD: bool, const ROWS: usize>(
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

    /// Sums `ROWS` rows from `first` on in registers.
    #[inline(always)]
    fn panel<L: Isa, const ADD: bool, const ROWS: usize>(&self, first: usize, out: &mut [F::Sum], out_step: usize) {
        let mut sums = [[Vector::splat(F::Sum::ZERO); VECTORS]; ROWS];
        let mut b_row = self.b.as_ptr();
        for run in self.inner {
            for inner in run.clone() {
                let at = first * self.a.row_step + inner * self.a.inner_step;
                // SAFETY: `checked_count` checked that `b` has a row for each inner index.
                let b: &[[F; LANES]; VECTORS] = unsafe { &*b_row.cast() };
                b_row = b_row.wrapping_add(self.b_step);
                let b = [F::load::<L>(&b[0]), F::load::<L>(&b[1])];
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: `checked_count` checked the last row at the largest inner index.
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

/// Loads one row.
#[inline(always)]
pub fn load_row<T: Real, L: Isa>(row: &[T]) -> RowLanes<T, L> {
    let mut vectors = [T::Vector::<L>::splat(T::ZERO); VECTORS];
    for (vector, part) in vectors.iter_mut().zip(row.as_chunks().0) {
        *vector = T::Vector::<L>::load(part);
    }
    vectors
}

/// Stores one row.
#[inline(always)]
pub fn store_row<T: Real, L: Isa>(vectors: RowLanes<T, L>, row: &mut [T]) {
    for (vector, part) in vectors.into_iter().zip(row.as_chunks_mut().0) {
        vector.store(part);
    }
}

/// Adds to one row.
#[inline(always)]
pub fn add_row<T: Real, L: Isa>(mut vectors: RowLanes<T, L>, row: &mut [T]) {
    let old = load_row::<T, L>(row);
    for vector in 0..VECTORS {
        vectors[vector] = vectors[vector].plus(old[vector]);
    }
    store_row::<T, L>(vectors, row);
}

#[cfg(test)]
mod tests {
    use super::super::matrix::Strided;
    use super::super::pair::Bf16Pair;
    use super::*;
    use half::bf16;
    use std::ops::Range;
    use std::panic::catch_unwind;

    /// Values that bf16 holds exactly, so that short sums of their products are exact with every instruction set.
    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 11) % 17) as f32 - 8.0).collect()
    }

    fn pairs(values: &[f32], width: usize) -> Vec<Bf16Pair> {
        let values: Vec<bf16> = values.iter().copied().map(bf16::from_f32).collect();
        let mut pairs = vec![Bf16Pair::default(); values.len() / 2];
        for (rows, out) in values.chunks_exact(2 * width).zip(pairs.chunks_exact_mut(width)) {
            Bf16Pair::pack_two_rows(&rows[..width], Some(&rows[width..]), out);
        }
        pairs
    }

    const STEPS: usize = 6;

    fn product<'a, F: Lane>(rows: usize, inner: &'a [Range<usize>], a: &'a [F], b: &'a [F]) -> MatrixProduct<'a, F> {
        MatrixProduct { rows, inner, a: Strided { values: a, row_step: STEPS, inner_step: 1 }, b, b_step: ROW }
    }

    /// Row counts around every panel height, and runs that skip inner indices.
    #[test]
    fn every_instruction_set_gives_the_sums_written_out() {
        let inner = [0..2, 3..3, 4..6];
        for (rows, features) in
            [1, 2, 3, 5, 12, 13, 31].into_iter().flat_map(|r| CpuFeatures::available().map(move |i| (r, i)))
        {
            let a = values(rows * STEPS, 1);
            let b = values(4 * ROW, 2);
            let wide = values(rows * 2 * STEPS, 3);
            let deep = values(8 * ROW, 4);
            let mut plain = vec![1.0; rows * ROW];
            let mut paired = vec![1.0; rows * ROW];
            product(rows, &inner, &a, &b).add_to(&mut plain, ROW, features);
            let mut row_pairs = vec![Bf16Pair::default(); rows * STEPS];
            <Bf16Pair as Lane>::pack_row(&wide, &mut row_pairs);
            product(rows, &inner, &row_pairs, &pairs(&deep, ROW)).add_to(&mut paired, ROW, features);
            for (row, lane) in (0..rows).flat_map(|row| (0..ROW).map(move |lane| (row, lane))) {
                let kept = [0, 1, 4, 5];
                let want: f32 = kept.iter().enumerate().map(|(i, k)| a[row * STEPS + k] * b[i * ROW + lane]).sum();
                assert_eq!(plain[row * ROW + lane], 1.0 + want, "{features:?}, {rows} rows");
                let product_of = |i: usize, k: usize, half: usize| {
                    wide[(row * STEPS + k) * 2 + half] * deep[(2 * i + half) * ROW + lane]
                };
                let want: f32 = kept.iter().enumerate().map(|(i, k)| product_of(i, *k, 0) + product_of(i, *k, 1)).sum();
                assert_eq!(paired[row * ROW + lane], 1.0 + want, "pairs, {features:?}, {rows} rows");
            }
        }
    }

    /// Long sums of pairs with the left operand by rows and by columns, over runs that begin and end anywhere.
    #[test]
    fn deep_products_give_the_sums_written_out() {
        const DEPTH: usize = 70;
        let runs = [0..DEPTH, 1..1, 3..21, 5..9, 30..62];
        for (rows, features) in [5, 16, 37, 64].into_iter().flat_map(|r| CpuFeatures::available().map(move |i| (r, i)))
        {
            let inner: Vec<usize> = runs.iter().flat_map(Clone::clone).collect();
            let wide = values(rows * 2 * DEPTH, 5);
            let mut by_rows = vec![Bf16Pair::default(); rows * DEPTH];
            <Bf16Pair as Lane>::pack_row(&wide, &mut by_rows);
            let mut by_columns = by_rows.clone();
            for (row, inner) in (0..rows).flat_map(|row| (0..DEPTH).map(move |inner| (row, inner))) {
                by_columns[inner * rows + row] = by_rows[row * DEPTH + inner];
            }
            let deep = values(inner.len() * 2 * ROW, 6);
            let b = pairs(&deep, ROW);
            let sides = [
                Strided { values: &by_rows[..], row_step: DEPTH, inner_step: 1 },
                Strided { values: &by_columns[..], row_step: 1, inner_step: rows },
            ];
            for a in sides {
                let mut sums = vec![1.0; rows * ROW];
                let mut alone = vec![f32::NAN; rows * ROW];
                let product = || MatrixProduct { rows, inner: &runs, a, b: &b, b_step: ROW };
                product().add_to(&mut sums, ROW, features);
                product().write_to(&mut alone, ROW, features);
                for (row, lane) in (0..rows).flat_map(|row| (0..ROW).map(move |lane| (row, lane))) {
                    let product_of = |i: usize, k: usize, half: usize| {
                        wide[(row * DEPTH + k) * 2 + half] * deep[(2 * i + half) * ROW + lane]
                    };
                    let want: f32 =
                        inner.iter().enumerate().map(|(i, k)| product_of(i, *k, 0) + product_of(i, *k, 1)).sum();
                    let found = (sums[row * ROW + lane], alone[row * ROW + lane]);
                    assert_eq!(found, (1.0 + want, want), "{features:?}, {rows} rows, {a:?}");
                }
            }
        }
    }

    #[test]
    fn sizes_beyond_the_slices_are_refused() {
        let a = vec![1f32; 12];
        let b = vec![1f32; 2 * ROW];
        let two = 0..2;
        let later = 1..3;
        let valid = || product(2, std::slice::from_ref(&two), &a, &b);
        let catch = |product: MatrixProduct<f32>| {
            catch_unwind(move || product.add_to(&mut [0.0; 2 * ROW], ROW, CpuFeatures::detect()))
        };
        assert!(catch(valid()).is_ok());
        let steps = |row_step, inner_step| Strided { values: &a[..], row_step, inner_step };
        let runs = [0..usize::MAX, 0..usize::MAX, 0..3];
        let invalid = [
            MatrixProduct { rows: 3, ..valid() },
            MatrixProduct { a: steps(usize::MAX / 2 + 2, 1), rows: 3, ..valid() },
            MatrixProduct { a: steps(6, usize::MAX), inner: std::slice::from_ref(&later), ..valid() },
            MatrixProduct { b_step: usize::MAX, ..valid() },
            MatrixProduct { inner: &runs, a: steps(0, 0), ..valid() },
        ];
        for product in invalid {
            assert!(catch(product).is_err());
        }
    }
}
