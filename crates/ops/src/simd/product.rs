//! [`MatrixProduct`]: the matrix product that all of ours are made of, 32 lanes wide. Knows no operation.

use super::{CpuFeatures, Isa, LANES, Lane, Real, SimdKernel, Vector};
use std::ops::Range;

/// Lanes of a row: two vectors. Each broadcast factor is used for both, so that loads do not hold back the
/// multiply-adds.
pub const ROW: usize = 32;

/// Vectors that hold a row's lanes.
pub const VECTORS: usize = ROW / LANES;

/// The lanes of one row in registers. Loops over it are written out: a closure would be compiled without the wider
/// instructions.
pub type RowLanes<T, L> = [<T as Real>::Vector<L>; VECTORS];

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
pub struct MatrixProduct<'a, F> {
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

impl<F: Lane> MatrixProduct<'_, F> {
    /// Adds to rows of 32 lanes of `out`, `out_step` apart.
    ///
    /// # Panics
    /// A slice is too short for the extents.
    pub fn add_to(self, out: &mut [F::Sum], out_step: usize, features: CpuFeatures) {
        features.run(Accumulate::<F, true> { product: self, out, out_step });
    }

    /// Writes rows of 32 lanes of `out`, `out_step` apart.
    ///
    /// # Panics
    /// A slice is too short for the extents.
    pub fn write_to(self, out: &mut [F::Sum], out_step: usize, features: CpuFeatures) {
        features.run(Accumulate::<F, false> { product: self, out, out_step });
    }

    /// Inner indices, where both sides hold as many as the extents say. Extents come from anybody, so sums of them may
    /// not wrap around.
    fn checked_count(&self) -> Option<usize> {
        let count = self.inner.iter().try_fold(0usize, |count, run| count.checked_add(run.len()))?;
        let (Some(last_row), Some(last)) = (self.rows.checked_sub(1), count.checked_sub(1)) else { return Some(count) };
        let last_inner = self.inner.iter().map(|run| run.end).max()?.checked_sub(1)?;
        let last_of_row = last_row.checked_mul(self.a.row_step)?;
        let end_of_a = last_of_row.checked_add(last_inner.checked_mul(self.a.inner_step)?)?.checked_add(1)?;
        let end_of_b = last.checked_mul(self.b_step)?.checked_add(ROW)?;
        (end_of_a <= self.a.values.len() && end_of_b <= self.b.len()).then_some(count)
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
        assert!(count.is_some(), "a product's slices are shorter than its extents");
        if product.rows == 0 || ADD && count == Some(0) {
            return;
        }
        let mut row = F::own_panels::<L, ADD>(&product, out, out_step);
        if L::WIDE {
            row = product.panels::<L, ADD, 12>(row, out, out_step);
            row = product.panels::<L, ADD, 4>(row, out, out_step);
        }
        row = product.panels::<L, ADD, 2>(row, out, out_step);
        product.panels::<L, ADD, 1>(row, out, out_step);
    }
}

impl<F: Lane> MatrixProduct<'_, F> {
    /// As many panels of `ROWS` as there are; gives back the first row that is left.
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

    #[inline(always)]
    fn panel<L: Isa, const ADD: bool, const ROWS: usize>(&self, first: usize, out: &mut [F::Sum], out_step: usize) {
        let mut sums = [[Vector::splat(F::Sum::ZERO); VECTORS]; ROWS];
        let mut b_row = self.b.as_ptr();
        for run in self.inner {
            for inner in run.clone() {
                let at = first * self.a.row_step + inner * self.a.inner_step;
                // SAFETY: `checked_count` found that `b` holds as many rows as there are inner indices.
                let b: &[[F; LANES]; VECTORS] = unsafe { &*b_row.cast() };
                b_row = b_row.wrapping_add(self.b_step);
                let b = [F::load::<L>(&b[0]), F::load::<L>(&b[1])];
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: `checked_count` found the last row of the largest inner index inside.
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
pub fn load_row<T: Real, L: Isa>(row: &[T]) -> RowLanes<T, L> {
    let mut vectors = [T::Vector::<L>::splat(T::ZERO); VECTORS];
    for (vector, part) in vectors.iter_mut().zip(row.as_chunks().0) {
        *vector = T::Vector::<L>::load(part);
    }
    vectors
}

/// Writes the lanes of one row.
#[inline(always)]
pub fn store_row<T: Real, L: Isa>(vectors: RowLanes<T, L>, row: &mut [T]) {
    for (vector, part) in vectors.into_iter().zip(row.as_chunks_mut().0) {
        vector.store(part);
    }
}

/// Adds to the lanes of one row.
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
    use super::super::Bf16Pair;
    use super::*;
    use half::bf16;
    use std::panic::catch_unwind;

    /// Numbers that bf16 holds exactly, so that products and sums of few are exact at every level.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 11) % 17) as f32 - 8.0).collect()
    }

    fn pairs(numbers: &[f32], width: usize) -> Vec<Bf16Pair> {
        let numbers: Vec<bf16> = numbers.iter().copied().map(bf16::from_f32).collect();
        let mut pairs = vec![Bf16Pair::default(); numbers.len() / 2];
        for (rows, out) in numbers.chunks_exact(2 * width).zip(pairs.chunks_exact_mut(width)) {
            Bf16Pair::across(&rows[..width], Some(&rows[width..]), out);
        }
        pairs
    }

    const STEPS: usize = 6;

    fn product<'a, F: Lane>(rows: usize, inner: &'a [Range<usize>], a: &'a [F], b: &'a [F]) -> MatrixProduct<'a, F> {
        MatrixProduct { rows, inner, a: Strided { values: a, row_step: STEPS, inner_step: 1 }, b, b_step: ROW }
    }

    /// Rows around every height of a panel, and runs that leave inner indices out.
    #[test]
    fn every_level_gives_the_sums_written_out() {
        let inner = [0..2, 3..3, 4..6];
        for (rows, features) in
            [1, 2, 3, 5, 12, 13, 31].into_iter().flat_map(|r| CpuFeatures::available().map(move |i| (r, i)))
        {
            let (a, b) = (numbers(rows * STEPS, 1), numbers(4 * ROW, 2));
            let (wide, deep) = (numbers(rows * 2 * STEPS, 3), numbers(8 * ROW, 4));
            let (mut plain, mut paired) = (vec![1.0; rows * ROW], vec![1.0; rows * ROW]);
            product(rows, &inner, &a, &b).add_to(&mut plain, ROW, features);
            let mut row_pairs = vec![Bf16Pair::default(); rows * STEPS];
            <Bf16Pair as Lane>::along(&wide, &mut row_pairs);
            product(rows, &inner, &row_pairs, &pairs(&deep, ROW)).add_to(&mut paired, ROW, features);
            for (row, lane) in (0..rows).flat_map(|row| (0..ROW).map(move |lane| (row, lane))) {
                let kept = [0, 1, 4, 5];
                let want: f32 = kept.iter().enumerate().map(|(i, k)| a[row * STEPS + k] * b[i * ROW + lane]).sum();
                assert_eq!(plain[row * ROW + lane], 1.0 + want, "{features:?}, {rows} rows");
                let one = |i: usize, k: usize, half: usize| {
                    wide[(row * STEPS + k) * 2 + half] * deep[(2 * i + half) * ROW + lane]
                };
                let want: f32 = kept.iter().enumerate().map(|(i, k)| one(i, *k, 0) + one(i, *k, 1)).sum();
                assert_eq!(paired[row * ROW + lane], 1.0 + want, "pairs, {features:?}, {rows} rows");
            }
        }
    }

    /// Deep products of pairs, the left side by rows and by columns, over runs that begin and end anywhere.
    #[test]
    fn deep_products_give_the_sums_written_out() {
        const DEPTH: usize = 70;
        let runs = [0..DEPTH, 1..1, 3..21, 5..9, 30..62];
        for (rows, features) in [5, 16, 37, 64].into_iter().flat_map(|r| CpuFeatures::available().map(move |i| (r, i)))
        {
            let inner: Vec<usize> = runs.iter().flat_map(Clone::clone).collect();
            let wide = numbers(rows * 2 * DEPTH, 5);
            let mut by_rows = vec![Bf16Pair::default(); rows * DEPTH];
            <Bf16Pair as Lane>::along(&wide, &mut by_rows);
            let mut by_columns = by_rows.clone();
            for (row, inner) in (0..rows).flat_map(|row| (0..DEPTH).map(move |inner| (row, inner))) {
                by_columns[inner * rows + row] = by_rows[row * DEPTH + inner];
            }
            let deep = numbers(inner.len() * 2 * ROW, 6);
            let b = pairs(&deep, ROW);
            let sides = [
                Strided { values: &by_rows[..], row_step: DEPTH, inner_step: 1 },
                Strided { values: &by_columns[..], row_step: 1, inner_step: rows },
            ];
            for a in sides {
                let (mut sums, mut alone) = (vec![1.0; rows * ROW], vec![f32::NAN; rows * ROW]);
                let product = || MatrixProduct { rows, inner: &runs, a, b: &b, b_step: ROW };
                product().add_to(&mut sums, ROW, features);
                product().write_to(&mut alone, ROW, features);
                for (row, lane) in (0..rows).flat_map(|row| (0..ROW).map(move |lane| (row, lane))) {
                    let one = |i: usize, k: usize, half: usize| {
                        wide[(row * DEPTH + k) * 2 + half] * deep[(2 * i + half) * ROW + lane]
                    };
                    let want: f32 = inner.iter().enumerate().map(|(i, k)| one(i, *k, 0) + one(i, *k, 1)).sum();
                    let found = (sums[row * ROW + lane], alone[row * ROW + lane]);
                    assert_eq!(found, (1.0 + want, want), "{features:?}, {rows} rows, {a:?}");
                }
            }
        }
    }

    #[test]
    fn extents_beyond_the_slices_are_refused() {
        let (a, b) = (vec![1f32; 12], vec![1f32; 2 * ROW]);
        let (two, later) = (0..2, 1..3);
        let good = || product(2, std::slice::from_ref(&two), &a, &b);
        let run = |product: MatrixProduct<f32>| {
            catch_unwind(move || product.add_to(&mut [0.0; 2 * ROW], ROW, CpuFeatures::detect()))
        };
        assert!(run(good()).is_ok());
        let steps = |row_step, inner_step| Strided { values: &a[..], row_step, inner_step };
        let runs = [0..usize::MAX, 0..usize::MAX, 0..3];
        let bad = [
            MatrixProduct { rows: 3, ..good() },
            MatrixProduct { a: steps(usize::MAX / 2 + 2, 1), rows: 3, ..good() },
            MatrixProduct { a: steps(6, usize::MAX), inner: std::slice::from_ref(&later), ..good() },
            MatrixProduct { b_step: usize::MAX, ..good() },
            MatrixProduct { inner: &runs, a: steps(0, 0), ..good() },
        ];
        for product in bad {
            assert!(run(product).is_err());
        }
    }
}
