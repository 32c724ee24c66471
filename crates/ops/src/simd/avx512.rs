//! Vectors in one AVX-512 register: [`Zmm`], [`Bf16Pairs`] and [`WidenedPairs`].

use super::pair::{Bf16Pair, PairVector};
use super::vector::{LANES, Vector};
use std::arch::x86_64::*;

/// 16 f32 in one register.
#[derive(Clone, Copy)]
pub struct Zmm(pub(in crate::simd) __m512);

// SAFETY of every block below: only the AVX-512 instruction sets use these types, and their code runs only where the
// processor has them; references to 16 f32 or 16 pairs can be read and written whole.
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

/// eˣ as [`crate::simd::Real::exponential`] computes it, except that `scalef` applies 2ⁿ.
#[inline(always)]
fn exponential(x: __m512) -> __m512 {
    const LOWEST: f32 = -87.3;
    const HIGHEST: f32 = 88.0;
    // SAFETY: see above.
    unsafe {
        // In this order of operands min and max let NaN through.
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

/// 16 pairs in one register of a processor with AVX-512 BF16, which multiplies and adds pairs in one instruction.
#[derive(Clone, Copy)]
pub struct Bf16Pairs(__m512i);

/// 16 pairs in one register of a processor with AVX-512 F alone; each product is two multiply-adds in f32.
#[derive(Clone, Copy)]
pub struct WidenedPairs(__m512i);

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
        // SAFETY: see above; both types are plain 512 bits.
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
            let a = _mm512_slli_epi32::<16>(self.0);
            let b = _mm512_slli_epi32::<16>(other.0);
            let c = _mm512_and_si512(self.0, high);
            let d = _mm512_and_si512(other.0, high);
            let sums = _mm512_fmadd_ps(_mm512_castsi512_ps(c), _mm512_castsi512_ps(d), sum.0);
            Zmm(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sums))
        }
    }
}
