//! [`Isa`] and [`SimdKernel`]: what one instruction set offers, and arithmetic that is compiled once for each of them.

use super::pair::PairVector;
use super::vector::Vector;

/// Arithmetic that [`CpuFeatures::run`](super::CpuFeatures::run) compiles for several instruction sets. Mark `run` and
/// everything it calls in its loops `#[inline(always)]`: only inlined code is compiled for the wider sets.
pub trait SimdKernel {
    /// The result.
    type Output;

    /// Whether it multiplies [`Bf16Pair`](super::Bf16Pair)s.
    const PAIRS: bool = false;

    /// Runs the arithmetic.
    fn run<L: Isa>(self) -> Self::Output;
}

/// An instruction set. The types that implement it are private, so a [`SimdKernel`] runs with an instruction set only
/// where [`CpuFeatures`](super::CpuFeatures) has detected it.
pub trait Isa: Copy + Send + Sync + 'static {
    /// Has fused multiply-add.
    const FUSED: bool;
    /// Has 32 registers of 512 bits (AVX-512).
    const WIDE: bool;
    /// Multiplies tiles of pairs (AMX).
    const TILES: bool = false;
    /// Has 16 registers of 256 bits (AVX2 with FMA).
    const NARROW: bool = false;
    /// 16 f32.
    type F32: Vector<f32>;
    /// 16 pairs of bf16.
    type Pairs: PairVector<Self::F32>;
}
