//! [`Vector`]: 16 values side by side, in as few registers as the instruction set allows.
//!
//! For loops that the compiler does not vectorize, or that must keep their accumulators in registers.

/// Lanes of a [`Vector`].
pub const LANES: usize = 16;

/// 16 values. Every method is inlined, so that it is compiled for the instruction set of the
/// [`SimdKernel`](super::SimdKernel) around it.
pub trait Vector<T>: Copy {
    /// The same value in all lanes.
    fn splat(value: T) -> Self;

    /// Loads 16 values.
    fn load(from: &[T; LANES]) -> Self;

    /// Stores the lanes.
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

    /// The lanes whose bit in `keep` is 1; -∞ in the others.
    fn keep(self, keep: u16) -> Self;

    /// eˣ, as [`Real::exponential`](super::Real::exponential).
    fn exponential(self) -> Self;
}
