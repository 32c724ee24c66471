//! [`Bf16Pair`]: two bf16 in 32 bits, and [`PairVector`], 16 of them side by side.
//!
//! Where the processor has the instruction (VDPBF16PS), two bf16 are multiplied by two others and both products are
//! added to an f32 at once.

use super::vector::LANES;

/// Two bf16, the first in the low half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Bf16Pair(pub(super) u32);

impl Bf16Pair {
    /// Two zeros.
    pub const ZERO: Self = Self(0);

    #[inline(always)]
    pub(super) fn new(first: f32, second: f32) -> Self {
        Self(bf16_bits(first) | bf16_bits(second) << 16)
    }

    #[inline(always)]
    pub(super) fn halves(self) -> [f32; 2] {
        [f32::from_bits(self.0 << 16), f32::from_bits(self.0 & 0xffff_0000)]
    }
}

/// Rounds to nearest, ties to even. NaN stays NaN: those that arithmetic produces have an empty low half, so the
/// rounding does not carry into the exponent.
#[inline(always)]
fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16
}

/// 16 pairs, whose products are accumulated in `S`.
pub trait PairVector<S>: Copy {
    /// The same pair in all lanes.
    fn splat(pair: Bf16Pair) -> Self;

    /// Loads 16 pairs.
    fn load(from: &[Bf16Pair; LANES]) -> Self;

    /// sum + self.first · other.first + self.second · other.second.
    fn multiply_add(self, other: Self, sum: S) -> S;
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn a_pair_rounds_as_bf16_does() {
        let values = [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, 3.0e38, f32::INFINITY, 1e-40, -7.77];
        for value in values {
            assert_eq!(Bf16Pair::new(value, 0.0).halves()[0].to_bits(), bf16::from_f32(value).to_f32().to_bits());
        }
        assert!(Bf16Pair::new(f32::NAN, 0.0).halves()[0].is_nan());
    }
}
