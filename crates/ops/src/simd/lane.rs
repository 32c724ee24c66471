//! [`Lane`]: what products are made of, a number or a [`Bf16Pair`] of bf16 numbers. Knows no matrix.
//!
//! Two bf16 numbers side by side are multiplied with two others and added up in f32 by one instruction (VDPBF16PS) where
//! the processor has it.

use super::vector::Array;
use super::{CpuFeatures, Element, Isa, LANES, MatrixProduct, ROW, Real, SimdKernel, Vector};
use std::marker::PhantomData;

/// What is multiplied: one number, or some that are multiplied one by one and added up.
pub trait Lane: Copy + Default + Send + Sync + 'static {
    /// What products are summed in.
    type Sum: Real;
    /// 16 factors.
    type Vector<L: Isa>: Copy;

    /// Numbers in a factor.
    const WIDTH: usize;

    /// A row of numbers as factors, rounded to nearest; a last one without a partner has 0 for it.
    fn along<E: Element<Work = Self::Sum>>(row: &[E], out: &mut [Self]);

    /// The numbers of [`Self::WIDTH`] rows as factors, column by column. Where there is no second row it counts as 0;
    /// numbers that are factors themselves take the first alone.
    fn across<E: Element<Work = Self::Sum>>(first: &[E], second: Option<&[E]>, out: &mut [Self]);

    /// The same factor in all lanes.
    fn splat<L: Isa>(self) -> Self::Vector<L>;

    /// What stands at `from`.
    fn load<L: Isa>(from: &[Self; LANES]) -> Self::Vector<L>;

    /// sum + a · b.
    fn multiply_add<L: Isa>(
        a: Self::Vector<L>,
        b: Self::Vector<L>,
        sum: <Self::Sum as Real>::Vector<L>,
    ) -> <Self::Sum as Real>::Vector<L>;

    /// Computes rows of a product whose extents were checked by panels made for this level, if it has some, and adds to or
    /// writes rows of 32 lanes of `out`; gives back the first row that is left.
    #[inline(always)]
    fn own_panels<L: Isa, const ADD: bool>(
        product: &MatrixProduct<'_, Self>,
        out: &mut [Self::Sum],
        out_step: usize,
    ) -> usize {
        let _ = (product, out, out_step);
        0
    }

    /// Rows of `width` numbers as factors along the columns: `[row][column]` to `[row / WIDTH][column]`. `space` is used
    /// where numbers are no factors themselves.
    fn along_columns<'a>(
        numbers: &'a [Self::Sum],
        width: usize,
        space: &'a mut Vec<Self>,
        features: CpuFeatures,
    ) -> &'a [Self];

    /// Rows of an even number of numbers as factors along the rows: `[row][column]` to `[row][column / WIDTH]`, with
    /// `space` as above.
    fn along_rows<'a>(numbers: &'a [Self::Sum], space: &'a mut Vec<Self>, features: CpuFeatures) -> &'a [Self];
}

impl<T: Real> Lane for T {
    type Sum = T;
    type Vector<L: Isa> = T::Vector<L>;

    const WIDTH: usize = 1;

    #[inline(always)]
    fn along<E: Element<Work = T>>(row: &[E], out: &mut [T]) {
        out.iter_mut().zip(row).for_each(|(out, number)| *out = number.load());
    }

    #[inline(always)]
    fn across<E: Element<Work = T>>(first: &[E], _: Option<&[E]>, out: &mut [T]) {
        Self::along(first, out);
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
    fn own_panels<L: Isa, const ADD: bool>(
        product: &MatrixProduct<'_, Self>,
        out: &mut [Self],
        out_step: usize,
    ) -> usize {
        <T as Real>::own_panels::<L, ADD>(product, out, out_step)
    }

    fn along_columns<'a>(numbers: &'a [T], _: usize, _: &'a mut Vec<T>, _: CpuFeatures) -> &'a [T] {
        numbers
    }

    fn along_rows<'a>(numbers: &'a [T], _: &'a mut Vec<T>, _: CpuFeatures) -> &'a [T] {
        numbers
    }
}

/// Writes up to 32 rows of numbers side by side, as factors along the rows: `out[factor][lane]`. Lanes without a row are 0.
#[inline(always)]
pub fn side_by_side<'a, E: Element, F: Lane<Sum = E::Work>>(
    rows: impl Iterator<Item = &'a [E]> + Clone,
    out: &mut [F],
) {
    // By as many factors as fill the lanes: a square that is turned over in the nearest cache.
    let mut square = [[F::default(); ROW]; ROW];
    for (block, out) in out.chunks_mut(ROW * ROW).enumerate() {
        let first = block * ROW * F::WIDTH;
        for (factors, row) in square.iter_mut().zip(rows.clone()) {
            let numbers = &row[first..];
            F::along(&numbers[..numbers.len().min(ROW * F::WIDTH)], factors);
        }
        for (step, out) in out.chunks_exact_mut(ROW).enumerate() {
            out.iter_mut().zip(&square).for_each(|(out, factors)| *out = factors[step]);
        }
    }
}

/// Two bf16 numbers, the first in the low half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Bf16Pair(u32);

impl Bf16Pair {
    /// Two zeros.
    pub const ZERO: Self = Self(0);

    #[inline(always)]
    fn new(first: f32, second: f32) -> Self {
        Self(bf16_bits(first) | bf16_bits(second) << 16)
    }

    #[inline(always)]
    fn halves(self) -> [f32; 2] {
        [f32::from_bits(self.0 << 16), f32::from_bits(self.0 & 0xffff_0000)]
    }
}

/// Rounded to nearest, ties to even. NaN stays one: what arithmetic makes has its low half empty.
#[inline(always)]
fn bf16_bits(number: f32) -> u32 {
    let bits = number.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16
}

impl Lane for Bf16Pair {
    type Sum = f32;
    type Vector<L: Isa> = L::Pairs;

    const WIDTH: usize = 2;

    #[inline(always)]
    fn along<E: Element<Work = f32>>(row: &[E], out: &mut [Self]) {
        let (pairs, rest) = row.as_chunks();
        for (out, [first, second]) in out.iter_mut().zip(pairs) {
            *out = Self::new(first.load(), second.load());
        }
        if let Some(last) = rest.first() {
            out[pairs.len()] = Self::new(last.load(), 0.0);
        }
    }

    #[inline(always)]
    fn across<E: Element<Work = f32>>(first: &[E], second: Option<&[E]>, out: &mut [Self]) {
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
    fn own_panels<L: Isa, const ADD: bool>(
        product: &MatrixProduct<'_, Self>,
        out: &mut [f32],
        out_step: usize,
    ) -> usize {
        // SAFETY: the level has tiles.
        if L::TILES { unsafe { super::amx::panels::<ADD>(product, out, out_step) } } else { 0 }
    }

    fn along_columns<'a>(
        numbers: &'a [f32],
        width: usize,
        space: &'a mut Vec<Self>,
        features: CpuFeatures,
    ) -> &'a [Self] {
        space.resize(numbers.len().div_ceil(2 * width) * width, Self::default());
        features.run(PairRows { numbers, width, out: space });
        space
    }

    fn along_rows<'a>(numbers: &'a [f32], space: &'a mut Vec<Self>, features: CpuFeatures) -> &'a [Self] {
        space.resize(numbers.len().div_ceil(2), Self::default());
        features.run(PairNeighbours { numbers, out: space });
        space
    }
}

/// Neighbouring numbers to pairs.
struct PairNeighbours<'a> {
    numbers: &'a [f32],
    out: &'a mut [Bf16Pair],
}

impl SimdKernel for PairNeighbours<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        Bf16Pair::along(self.numbers, self.out);
    }
}

/// Rows of numbers to pairs of neighbouring rows.
struct PairRows<'a> {
    numbers: &'a [f32],
    width: usize,
    out: &'a mut [Bf16Pair],
}

impl SimdKernel for PairRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (rows, out) in self.numbers.chunks(2 * self.width).zip(self.out.chunks_exact_mut(self.width)) {
            let (first, second) = rows.split_at(self.width);
            Bf16Pair::across(first, (!second.is_empty()).then_some(second), out);
        }
    }
}

/// 16 pairs, whose products are summed in `S`.
pub trait PairVector<S>: Copy {
    /// The same pair in all lanes.
    fn splat(pair: Bf16Pair) -> Self;

    /// What stands at `from`.
    fn load(from: &[Bf16Pair; LANES]) -> Self;

    /// sum + the products of first with first and of second with second.
    fn multiply_add(self, other: Self, sum: S) -> S;
}

/// The pairs as an array: two multiplications in f32.
#[derive(Clone, Copy)]
pub struct PairArray<L>([Bf16Pair; LANES], PhantomData<L>);

impl<L: Isa> PairVector<Array<f32, L>> for PairArray<L> {
    #[inline(always)]
    fn splat(pair: Bf16Pair) -> Self {
        Self([pair; LANES], PhantomData)
    }

    #[inline(always)]
    fn load(from: &[Bf16Pair; LANES]) -> Self {
        Self(*from, PhantomData)
    }

    #[inline(always)]
    fn multiply_add(self, other: Self, sum: Array<f32, L>) -> Array<f32, L> {
        let mut sums = [0.0; LANES];
        sum.store(&mut sums);
        for ((sum, ours), theirs) in sums.iter_mut().zip(self.0).zip(other.0) {
            let ([a, c], [b, d]) = (ours.halves(), theirs.halves());
            *sum = a.times_plus::<L>(b, c.times_plus::<L>(d, *sum));
        }
        Array::load(&sums)
    }
}

#[cfg(target_arch = "x86_64")]
pub use zmm::{Bf16Pairs, WidenedPairs};

#[cfg(target_arch = "x86_64")]
mod zmm {
    use super::{Bf16Pair, LANES, PairVector};
    use crate::simd::vector::Zmm;
    use std::arch::x86_64::*;

    /// 16 pairs in a register of a processor that multiplies them.
    #[derive(Clone, Copy)]
    pub struct Bf16Pairs(__m512i);

    /// 16 pairs in a register of AVX-512 F alone: two multiplications in f32.
    #[derive(Clone, Copy)]
    pub struct WidenedPairs(__m512i);

    // SAFETY of every block below: the types are those of levels `Avx512Bf16` and `Avx512` alone, whose code runs
    // only where the processor has those instructions; references to 16 pairs can be read whole.
    #[inline(always)]
    fn splat(pair: Bf16Pair) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(pair.0 as i32) }
    }

    #[inline(always)]
    fn load(from: &[Bf16Pair; LANES]) -> __m512i {
        // SAFETY: see above; a pair is 32 bits.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    impl PairVector<Zmm> for Bf16Pairs {
        #[inline(always)]
        fn splat(pair: Bf16Pair) -> Self {
            Self(splat(pair))
        }

        #[inline(always)]
        fn load(from: &[Bf16Pair; LANES]) -> Self {
            Self(load(from))
        }

        #[inline(always)]
        fn multiply_add(self, other: Self, sum: Zmm) -> Zmm {
            // SAFETY: see above; both types are 512 bits without meaning of their own.
            unsafe {
                let a = std::mem::transmute::<__m512i, __m512bh>(self.0);
                let b = std::mem::transmute::<__m512i, __m512bh>(other.0);
                Zmm(_mm512_dpbf16_ps(sum.0, a, b))
            }
        }
    }

    impl PairVector<Zmm> for WidenedPairs {
        #[inline(always)]
        fn splat(pair: Bf16Pair) -> Self {
            Self(splat(pair))
        }

        #[inline(always)]
        fn load(from: &[Bf16Pair; LANES]) -> Self {
            Self(load(from))
        }

        #[inline(always)]
        fn multiply_add(self, other: Self, sum: Zmm) -> Zmm {
            // SAFETY: see above.
            unsafe {
                let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                let (a, b) = (_mm512_slli_epi32::<16>(self.0), _mm512_slli_epi32::<16>(other.0));
                let (c, d) = (_mm512_and_si512(self.0, high), _mm512_and_si512(other.0, high));
                let sums = _mm512_fmadd_ps(_mm512_castsi512_ps(c), _mm512_castsi512_ps(d), sum.0);
                Zmm(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sums))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn a_pair_rounds_as_bf16_does() {
        let numbers = [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, 3.0e38, f32::INFINITY, 1e-40, -7.77];
        for number in numbers {
            assert_eq!(Bf16Pair::new(number, 0.0).halves()[0].to_bits(), bf16::from_f32(number).to_f32().to_bits());
        }
        assert!(Bf16Pair::new(f32::NAN, 0.0).halves()[0].is_nan());
    }

    #[test]
    fn columns_are_paired_and_the_last_may_stand_alone() {
        let (rows, mut space) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], Vec::new());
        let pairs = Bf16Pair::along_columns(&rows, 2, &mut space, CpuFeatures::detect());
        assert_eq!(
            pairs,
            [Bf16Pair::new(1.0, 3.0), Bf16Pair::new(2.0, 4.0), Bf16Pair::new(5.0, 0.0), Bf16Pair::new(6.0, 0.0)]
        );
    }
}
