//! [`Vector`]: 16 numbers side by side, in as few registers as the instruction set allows.
//!
//! For loops that do not vectorise by themselves, or that must keep sums in registers. Knows no operation of ours.

use super::{Isa, Real};
use std::marker::PhantomData;

/// Numbers in a [`Vector`].
pub const LANES: usize = 16;

/// 16 numbers. Every method is inlined, so that it is compiled for the instructions of the [`super::SimdKernel`] around it.
pub trait Vector<T>: Copy {
    /// The same number in all lanes.
    fn splat(value: T) -> Self;

    /// What stands at `from`.
    fn load(from: &[T; LANES]) -> Self;

    /// Writes to `to`.
    fn store(self, to: &mut [T; LANES]);

    /// self + other.
    fn plus(self, other: Self) -> Self;

    /// self - other.
    fn minus(self, other: Self) -> Self;

    /// self · other.
    fn times(self, other: Self) -> Self;

    /// self · a + b.
    fn times_plus(self, a: Self, b: Self) -> Self;

    /// The larger of both; `other` where self is NaN.
    fn larger(self, other: Self) -> Self;

    /// Whether any lane differs.
    fn differs(self, other: Self) -> bool;

    /// -∞ where the lane's bit in `keep` is 0.
    fn keep(self, keep: u16) -> Self;

    /// e to the self, as [`Real::exponential`].
    fn exponential(self) -> Self;
}

/// The lanes as an array, which the compiler puts into registers of its choice.
#[derive(Clone, Copy)]
pub struct Array<T, L>([T; LANES], PhantomData<L>);

impl<T: Real, L: Isa> Array<T, L> {
    #[inline(always)]
    fn each(mut self, change: impl Fn(usize, T) -> T) -> Self {
        for lane in 0..LANES {
            self.0[lane] = change(lane, self.0[lane]);
        }
        self
    }
}

impl<T: Real, L: Isa> Vector<T> for Array<T, L> {
    #[inline(always)]
    fn splat(value: T) -> Self {
        Self([value; LANES], PhantomData)
    }

    #[inline(always)]
    fn load(from: &[T; LANES]) -> Self {
        Self(*from, PhantomData)
    }

    #[inline(always)]
    fn store(self, to: &mut [T; LANES]) {
        *to = self.0;
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self.each(|lane, value| value + other.0[lane])
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self.each(|lane, value| value - other.0[lane])
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self.each(|lane, value| value * other.0[lane])
    }

    #[inline(always)]
    fn times_plus(self, a: Self, b: Self) -> Self {
        self.each(|lane, value| value.times_plus::<L>(a.0[lane], b.0[lane]))
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        self.each(|lane, value| if value > other.0[lane] { value } else { other.0[lane] })
    }

    #[inline(always)]
    fn differs(self, other: Self) -> bool {
        self.0 != other.0
    }

    #[inline(always)]
    fn keep(self, keep: u16) -> Self {
        self.each(|lane, value| if keep >> lane & 1 == 1 { value } else { T::MINUS_INFINITY })
    }

    #[inline(always)]
    fn exponential(self) -> Self {
        self.each(|_, value| value.exponential::<L>())
    }
}

#[cfg(target_arch = "x86_64")]
pub use zmm::Zmm;

#[cfg(target_arch = "x86_64")]
mod zmm {
    use super::{LANES, Vector};
    use std::arch::x86_64::*;

    /// 16 f32 in one register of AVX-512.
    #[derive(Clone, Copy)]
    pub struct Zmm(pub(in crate::simd) __m512);

    // SAFETY of every block below: the type is that of the levels of AVX-512 alone, whose code runs only where the processor
    // has it; references to 16 numbers can be read and written whole.
    impl Vector<f32> for Zmm {
        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_loadu_ps(from.as_ptr()) })
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        fn plus(self, other: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn minus(self, other: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_sub_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn times(self, other: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_mul_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn times_plus(self, a: Self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
        }

        #[inline(always)]
        fn larger(self, other: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn differs(self, other: Self) -> bool {
            // SAFETY: see above.
            unsafe { _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(self.0, other.0) != 0 }
        }

        #[inline(always)]
        fn keep(self, keep: u16) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), keep, self.0) })
        }

        #[inline(always)]
        fn exponential(self) -> Self {
            Self(exponential(self.0))
        }
    }

    /// eˣ as [`crate::simd::Real::exponential`] computes it, but for the last step: 2ⁿ is applied by `scalef`.
    #[inline(always)]
    fn exponential(x: __m512) -> __m512 {
        const LOWEST: f32 = -87.3;
        const HIGHEST: f32 = 88.0;
        // SAFETY: see above.
        unsafe {
            // The operand order lets NaN through.
            let clamped = _mm512_min_ps(_mm512_set1_ps(HIGHEST), _mm512_max_ps(_mm512_set1_ps(LOWEST), x));
            let powers_of_two = _mm512_mul_ps(clamped, _mm512_set1_ps(std::f32::consts::LOG2_E));
            let whole = _mm512_roundscale_ps::<0>(powers_of_two);
            let high = _mm512_fmadd_ps(whole, _mm512_set1_ps(-0.693_359_4), clamped);
            let r = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.121_944_4e-4), high);
            let mut power = _mm512_set1_ps(1.987_569_1e-4);
            for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(coefficient));
            }
            let power = _mm512_add_ps(_mm512_fmadd_ps(power, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0));
            let inside = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(LOWEST));
            _mm512_maskz_scalef_ps(inside, power, whole)
        }
    }
}
