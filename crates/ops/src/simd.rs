//! Generic arithmetic that is compiled for several instruction sets and chosen at run time.
//!
//! A [`SimdKernel`] is written once over [`Real`] values, in loops that the compiler vectorizes. [`CpuFeatures::run`]
//! runs the copy that was compiled for these features, [`dispatch`] the best one for this processor.

#[cfg(target_arch = "x86_64")]
mod amx;
mod array;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod features;
mod isa;
mod lane;
mod matrix;
mod pair;
mod product;
mod vector;

pub use features::{CpuFeatures, dispatch};
pub use isa::{Isa, SimdKernel};
pub use lane::{Lane, pack_transposed};
pub use matrix::{MatrixProduct, ROW, Strided, VECTORS};
pub use pair::{Bf16Pair, PairVector};
pub use product::{RowLanes, add_row, load_row, store_row};
pub use vector::{LANES, Vector};

use array::Array;

use candle_core::WithDType;
use half::bf16;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// The type that arithmetic is done in: f32 or f64.
pub trait Real:
    WithDType
    + Element<Work = Self>
    + Default
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// 16 lanes.
    type Vector<L: Isa>: Vector<Self>;

    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// A finite stand-in for -∞ as the initial maximum of scores: below every score, and its difference from itself is
    /// 0 where that of -∞ would be NaN.
    const LOWEST: Self;
    /// -∞.
    const MINUS_INFINITY: Self;

    /// The nearest to `value`.
    fn cast(value: f64) -> Self;

    /// self · a + b, fused where the instruction set has fused multiply-add.
    fn times_plus<L: Isa>(self, a: Self, b: Self) -> Self;

    /// √self.
    fn root(self) -> Self;

    /// eˣ. In f32 within 2 units in the last place, exactly 0 below -87.3, and at most e⁸⁸.
    fn exponential<L: Isa>(self) -> Self;

    /// [`Lane::isa_panels`] for lanes of one value.
    #[inline(always)]
    fn isa_panels<L: Isa, const ADD: bool>(
        product: &MatrixProduct<'_, Self>,
        out: &mut [Self],
        out_step: usize,
    ) -> usize {
        let _ = (product, out, out_step);
        0
    }
}

impl Real for f32 {
    type Vector<L: Isa> = L::F32;

    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = -1e30;
    const MINUS_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn cast(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn times_plus<L: Isa>(self, a: Self, b: Self) -> Self {
        if L::FUSED { self.mul_add(a, b) } else { self * a + b }
    }

    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn exponential<L: Isa>(self) -> Self {
        exp_f32::<L>(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn isa_panels<L: Isa, const ADD: bool>(
        product: &MatrixProduct<'_, Self>,
        out: &mut [Self],
        out_step: usize,
    ) -> usize {
        // SAFETY: the instruction set has AVX2 and FMA.
        if L::NARROW { unsafe { avx2::panels::<ADD>(product, out, out_step) } } else { 0 }
    }
}

impl Real for f64 {
    type Vector<L: Isa> = Array<f64, L>;

    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = -1e300;
    const MINUS_INFINITY: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn cast(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn times_plus<L: Isa>(self, a: Self, b: Self) -> Self {
        if L::FUSED { self.mul_add(a, b) } else { self * a + b }
    }

    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn exponential<L: Isa>(self) -> Self {
        f64::exp(self)
    }
}

// eˣ is a normal f32 between these bounds: below -87.33 it would be subnormal, from 88.73 on infinite.
const LOWEST_EXPONENT: f32 = -87.3;
const HIGHEST_EXPONENT: f32 = 88.0;

/// eˣ = 2ⁿ eʳ with n the integer nearest to x / ln 2 and |r| ≤ ln 2 / 2; eʳ is a polynomial of degree 7 (Cephes, expf).
/// The comparisons are written so that NaN passes through.
#[inline(always)]
fn exp_f32<L: Isa>(x: f32) -> f32 {
    // 1.5 · 2²³: adding it rounds to the nearest integer, which the low bits of the sum then hold.
    const ROUND: f32 = 12_582_912.0;
    let low = if x < LOWEST_EXPONENT { LOWEST_EXPONENT } else { x };
    let clamped = if low > HIGHEST_EXPONENT { HIGHEST_EXPONENT } else { low };
    let shifted = clamped.times_plus::<L>(std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = whole.times_plus::<L>(2.121_944_4e-4, whole.times_plus::<L>(-0.693_359_4, clamped));
    let power = 1.987_569_1e-4f32
        .times_plus::<L>(r, 1.398_199_9e-3)
        .times_plus::<L>(r, 8.333_452e-3)
        .times_plus::<L>(r, 4.166_579_6e-2)
        .times_plus::<L>(r, 1.666_666_5e-1)
        .times_plus::<L>(r, 0.5)
        .times_plus::<L>(r * r, r)
        + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    let value = power * f32::from_bits(exponent << 23);
    if x < LOWEST_EXPONENT { 0.0 } else { value }
}

/// The type that values are stored in, and the one they are computed in.
pub trait Element: WithDType {
    /// f32 for bf16, otherwise the type itself.
    type Work: Real;

    /// Widens to the working type.
    fn load(self) -> Self::Work;

    /// Rounds to nearest.
    fn store(work: Self::Work) -> Self;
}

impl Element for f32 {
    type Work = f32;

    #[inline(always)]
    fn load(self) -> f32 {
        self
    }

    #[inline(always)]
    fn store(work: f32) -> Self {
        work
    }
}

impl Element for f64 {
    type Work = f64;

    #[inline(always)]
    fn load(self) -> f64 {
        self
    }

    #[inline(always)]
    fn store(work: f64) -> Self {
        work
    }
}

impl Element for bf16 {
    type Work = f32;

    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn store(work: f32) -> Self {
        bf16::from_f32(work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exponentials<'a>(&'a mut [f32]);

    impl SimdKernel for Exponentials<'_> {
        type Output = ();

        #[inline(always)]
        fn run<L: Isa>(self) {
            for x in self.0 {
                *x = x.exponential::<L>();
            }
        }
    }

    struct VectorExponentials<'a>(&'a mut [f32]);

    impl SimdKernel for VectorExponentials<'_> {
        type Output = ();

        #[inline(always)]
        fn run<L: Isa>(self) {
            for x in self.0.as_chunks_mut().0 {
                L::F32::load(x).exponential().store(x);
            }
        }
    }

    /// The largest relative error.
    fn worst(kernel: impl Fn(&mut [f32])) -> f64 {
        let inputs: Vec<f32> = (0..400_000).map(|i| -87.2 + 4.38e-4 * i as f32).filter(|x| *x < 88.0).collect();
        assert_eq!(inputs.len() % LANES, 0);
        let mut outputs = inputs.clone();
        kernel(&mut outputs);
        let error = |(x, y): (&f32, &f32)| (f64::from(*y) / f64::from(*x).exp() - 1.0).abs();
        inputs.iter().zip(&outputs).map(error).fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for features in CpuFeatures::available() {
            assert!(worst(|x| features.run(Exponentials(x))) < 2.4e-7, "{features:?}");
            assert!(worst(|x| features.run(VectorExponentials(x))) < 2.4e-7, "{features:?}");
        }
    }

    #[test]
    fn exp_is_right_at_the_ends_of_its_range() {
        let alone: fn(CpuFeatures, &mut [f32]) = |features, x| features.run(Exponentials(x));
        let together: fn(CpuFeatures, &mut [f32]) = |features, x| features.run(VectorExponentials(x));
        for features in CpuFeatures::available() {
            for exponentials in [alone, together] {
                let mut ends = [0.0; LANES];
                ends[..6].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -88.0, 0.0, f32::NAN, 1e30]);
                exponentials(features, &mut ends);
                assert_eq!(ends[..4], [0.0, 0.0, 0.0, 1.0], "{features:?}");
                assert!(ends[4].is_nan() && ends[5].is_finite(), "{features:?}: {ends:?}");
            }
        }
    }

    #[test]
    fn the_fastest_instruction_set_is_one_of_those_available() {
        let available: Vec<CpuFeatures> = CpuFeatures::available().collect();
        assert!(available.contains(&CpuFeatures::detect()));
        assert!(available.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
