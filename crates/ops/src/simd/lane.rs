//! [`Lane`]: what one lane of a vector holds when matrices are multiplied, a float or a [`Bf16Pair`].

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::features::CpuFeatures;
use super::isa::{Isa, SimdKernel};
use super::matrix::{MatrixProduct, ROW};
use super::pair::{Bf16Pair, PairVector};
use super::vector::{LANES, Vector};
use super::{Element, Real};

/// What one lane holds: one float, or a pair of bf16 whose products are added. Matrices are packed into lanes before
/// they are multiplied.
pub trait Lane: Copy + Default + Send + Sync + 'static {
    /// The type of the accumulators.
    type Sum: Real;
    /// 16 lanes.
    type Vector<L: Isa>: Copy;

    /// Elements per lane.
    const WIDTH: usize;

    /// Packs the elements of a row, neighbours together, rounded to nearest. A last element without a partner is paired
    /// with 0.
    fn pack_row<E: Element<Work = Self::Sum>>(row: &[E], out: &mut [Self]);

    /// Packs [`Self::WIDTH`] rows column by column; a missing second row counts as 0. Where a lane is one element, only
    /// the first row is used.
    fn pack_two_rows<E: Element<Work = Self::Sum>>(first: &[E], second: Option<&[E]>, out: &mut [Self]);

    /// The same value in all lanes.
    fn splat<L: Isa>(self) -> Self::Vector<L>;

    /// Loads 16 lanes.
    fn load<L: Isa>(from: &[Self; LANES]) -> Self::Vector<L>;

    /// sum + a · b.
    fn multiply_add<L: Isa>(
        a: Self::Vector<L>,
        b: Self::Vector<L>,
        sum: <Self::Sum as Real>::Vector<L>,
    ) -> <Self::Sum as Real>::Vector<L>;

    /// Computes rows of a product, whose sizes have been checked, by panels written for this instruction set, if there
    /// are any. Adds them to or writes them to rows of 32 lanes of `out`; returns the first row that is left.
    #[inline(always)]
    fn isa_panels<L: Isa, const ADD: bool>(
        product: &MatrixProduct<'_, Self>,
        out: &mut [Self::Sum],
        out_step: usize,
    ) -> usize {
        let _ = (product, out, out_step);
        0
    }

    /// Packs rows of `width` values across rows: `[row][column]` to `[row / WIDTH][column]`. `space` is used where a
    /// lane is more than one value; otherwise the values are returned as they are.
    fn pack_across_rows<'a>(
        values: &'a [Self::Sum],
        width: usize,
        space: &'a mut Vec<Self>,
        features: CpuFeatures,
    ) -> &'a [Self];

    /// Packs rows of even length along the rows: `[row][column]` to `[row][column / WIDTH]`, with `space` as above.
    fn pack_along_rows<'a>(values: &'a [Self::Sum], space: &'a mut Vec<Self>, features: CpuFeatures) -> &'a [Self];
}

impl<T: Real> Lane for T {
    type Sum = T;
    type Vector<L: Isa> = T::Vector<L>;

    const WIDTH: usize = 1;

    #[inline(always)]
    fn pack_row<E: Element<Work = T>>(row: &[E], out: &mut [T]) {
        out.iter_mut().zip(row).for_each(|(out, value)| *out = value.load());
    }

    #[inline(always)]
    fn pack_two_rows<E: Element<Work = T>>(first: &[E], _: Option<&[E]>, out: &mut [T]) {
        Self::pack_row(first, out);
    }

    #[inline(always)]
    fn splat<L: Isa>(self) -> T::Vector<L> {
        Vector::splat(self)
    }

    #[inline(always)]
    fn load<L: Isa>(from: &[T; LANES]) -> T::Vector<L> {
        Vector::load(from)
    }

    #[inline(always)]
    fn multiply_add<L: Isa>(a: T::Vector<L>, b: T::Vector<L>, sum: T::Vector<L>) -> T::Vector<L> {
        a.times_plus(b, sum)
    }

    #[inline(always)]
    fn isa_panels<L: Isa, const ADD: bool>(
        product: &MatrixProduct<'_, Self>,
        out: &mut [Self],
        out_step: usize,
    ) -> usize {
        <T as Real>::isa_panels::<L, ADD>(product, out, out_step)
    }

    fn pack_across_rows<'a>(values: &'a [T], _: usize, _: &'a mut Vec<T>, _: CpuFeatures) -> &'a [T] {
        values
    }

    fn pack_along_rows<'a>(values: &'a [T], _: &'a mut Vec<T>, _: CpuFeatures) -> &'a [T] {
        values
    }
}

/// Packs up to 32 rows along the rows and transposes them: `out[column / WIDTH][row]`. Missing rows are 0.
#[inline(always)]
pub fn pack_transposed<'a, E: Element, F: Lane<Sum = E::Work>>(
    rows: impl Iterator<Item = &'a [E]> + Clone,
    out: &mut [F],
) {
    // In squares of 32 x 32, 4 KiB of f32 or pairs, which are transposed in the L1 cache.
    let mut square = [[F::default(); ROW]; ROW];
    for (block, out) in out.chunks_mut(ROW * ROW).enumerate() {
        let first = block * ROW * F::WIDTH;
        for (packed, row) in square.iter_mut().zip(rows.clone()) {
            let elements = &row[first..];
            F::pack_row(&elements[..elements.len().min(ROW * F::WIDTH)], packed);
        }
        for (step, out) in out.chunks_exact_mut(ROW).enumerate() {
            out.iter_mut().zip(&square).for_each(|(out, packed)| *out = packed[step]);
        }
    }
}

impl Lane for Bf16Pair {
    type Sum = f32;
    type Vector<L: Isa> = L::Pairs;

    const WIDTH: usize = 2;

    #[inline(always)]
    fn pack_row<E: Element<Work = f32>>(row: &[E], out: &mut [Self]) {
        let (pairs, rest) = row.as_chunks();
        for (out, [first, second]) in out.iter_mut().zip(pairs) {
            *out = Self::new(first.load(), second.load());
        }
        if let Some(last) = rest.first() {
            out[pairs.len()] = Self::new(last.load(), 0.0);
        }
    }

    #[inline(always)]
    fn pack_two_rows<E: Element<Work = f32>>(first: &[E], second: Option<&[E]>, out: &mut [Self]) {
        match second {
            None => out.iter_mut().zip(first).for_each(|(out, first)| *out = Self::new(first.load(), 0.0)),
            Some(second) => {
                for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
                    *out = Self::new(first.load(), second.load());
                }
            }
        }
    }

    #[inline(always)]
    fn splat<L: Isa>(self) -> L::Pairs {
        PairVector::splat(self)
    }

    #[inline(always)]
    fn load<L: Isa>(from: &[Self; LANES]) -> L::Pairs {
        PairVector::load(from)
    }

    #[inline(always)]
    fn multiply_add<L: Isa>(a: L::Pairs, b: L::Pairs, sum: L::F32) -> L::F32 {
        a.multiply_add(b, sum)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn isa_panels<L: Isa, const ADD: bool>(
        product: &MatrixProduct<'_, Self>,
        out: &mut [f32],
        out_step: usize,
    ) -> usize {
        // SAFETY: the instruction set has tiles.
        if L::TILES { unsafe { amx::panels::<ADD>(product, out, out_step) } } else { 0 }
    }

    fn pack_across_rows<'a>(
        values: &'a [f32],
        width: usize,
        space: &'a mut Vec<Self>,
        features: CpuFeatures,
    ) -> &'a [Self] {
        space.resize(values.len().div_ceil(2 * width) * width, Self::default());
        features.run(PairRows { values, width, out: space });
        space
    }

    fn pack_along_rows<'a>(values: &'a [f32], space: &'a mut Vec<Self>, features: CpuFeatures) -> &'a [Self] {
        space.resize(values.len().div_ceil(2), Self::default());
        features.run(PairNeighbours { values, out: space });
        space
    }
}

/// Packs neighbouring values into pairs.
struct PairNeighbours<'a> {
    values: &'a [f32],
    out: &'a mut [Bf16Pair],
}

impl SimdKernel for PairNeighbours<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        Bf16Pair::pack_row(self.values, self.out);
    }
}

/// Packs neighbouring rows into rows of pairs.
struct PairRows<'a> {
    values: &'a [f32],
    width: usize,
    out: &'a mut [Bf16Pair],
}

impl SimdKernel for PairRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (rows, out) in self.values.chunks(2 * self.width).zip(self.out.chunks_exact_mut(self.width)) {
            let (first, second) = rows.split_at(self.width);
            Bf16Pair::pack_two_rows(first, (!second.is_empty()).then_some(second), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_paired_and_the_last_may_be_alone() {
        let rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let mut space = Vec::new();
        let pairs = Bf16Pair::pack_across_rows(&rows, 2, &mut space, CpuFeatures::detect());
        assert_eq!(
            pairs,
            [Bf16Pair::new(1.0, 3.0), Bf16Pair::new(2.0, 4.0), Bf16Pair::new(5.0, 0.0), Bf16Pair::new(6.0, 0.0)]
        );
    }
}
