//! [`CpuFeatures`]: what a piece of arithmetic is compiled for, and [`SimdKernel`], the arithmetic. Knows no number.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::vector::Array;
use super::{PairVector, Vector, lane};

/// Runs `task` with the best instructions of this processor.
pub fn dispatch<T: SimdKernel>(kernel: T) -> T::Output {
    CpuFeatures::detect().run(kernel)
}

/// A set of instructions. There is a value only for sets that this processor has, so code for a set runs nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuFeatures(IsaLevel);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IsaLevel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// The sets, from the least to the best.
#[cfg(target_arch = "x86_64")]
const SETS: &[IsaLevel] = &[IsaLevel::Portable, IsaLevel::Avx2, IsaLevel::Avx512, IsaLevel::Avx512Bf16, IsaLevel::Amx];
#[cfg(not(target_arch = "x86_64"))]
const SETS: &[IsaLevel] = &[IsaLevel::Portable];

impl CpuFeatures {
    /// The best of this processor.
    pub fn detect() -> Self {
        Self(SETS.iter().copied().rev().find(|set| set.is_here()).unwrap_or(IsaLevel::Portable))
    }

    /// All that this processor has, from the least to the best.
    pub fn available() -> impl Iterator<Item = Self> {
        SETS.iter().copied().filter(|set| set.is_here()).map(Self)
    }

    /// Whether they multiply [`Bf16Pair`](super::Pair)s at once, and so faster than numbers in f32.
    pub fn multiply_pairs(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self.0, IsaLevel::Avx512Bf16 | IsaLevel::Amx);
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether there are any vectors that this crate knows of.
    pub fn have_vectors(self) -> bool {
        self.0 != IsaLevel::Portable
    }

    /// Whether vectors are AVX2's, whose 16 registers hold the sums of few rows.
    pub fn are_narrow(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == IsaLevel::Avx2;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Runs `task` with them.
    pub fn run<T: SimdKernel>(self, kernel: T) -> T::Output {
        match self.0 {
            IsaLevel::Portable => kernel.run::<Portable>(),
            // SAFETY: `is_here` found the features that the callee is compiled for before there was a value.
            #[cfg(target_arch = "x86_64")]
            IsaLevel::Avx2 => unsafe { with_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            IsaLevel::Avx512Bf16 if const { T::PAIRS } => unsafe { with_avx512_bf16::<false, T>(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            IsaLevel::Amx if const { T::PAIRS } => unsafe { with_avx512_bf16::<true, T>(kernel) },
            // SAFETY: as above; whatever has BF16 was found to have these too.
            #[cfg(target_arch = "x86_64")]
            IsaLevel::Avx512 | IsaLevel::Avx512Bf16 | IsaLevel::Amx => unsafe { with_avx512(kernel) },
        }
    }
}

impl IsaLevel {
    /// Whether this processor has it: exactly the features that the functions below are compiled for.
    fn is_here(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Self::Avx2.is_here() && is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512.is_here() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_here() && amx::is_here(),
        }
    }
}

/// Arithmetic to run under [`CpuFeatures`]. Mark `run` and all it calls in its loops `#[inline(always)]`: only what is
/// inlined is compiled for the wider ones.
pub trait SimdKernel {
    /// What it gives back.
    type Output;

    /// Whether it multiplies [`Bf16Pair`](super::Pair)s.
    const PAIRS: bool = false;

    /// Does it.
    fn run<L: Isa>(self) -> Self::Output;
}

/// What a set of instructions can do. Nobody outside this module can name one, so that a [`SimdKernel`] runs at a level only
/// where [`CpuFeatures`] chose it.
pub trait Isa: Copy + Send + Sync + 'static {
    /// Multiplies and adds in one instruction.
    const FUSED: bool;
    /// Has 32 registers of 512 bits.
    const WIDE: bool;
    /// Multiplies tiles of pairs.
    const TILES: bool = false;
    /// Has 16 registers of 256 bits, and AVX2 with FMA for them.
    const NARROW: bool = false;
    /// 16 f32.
    type F32: Vector<f32>;
    /// 16 pairs.
    type Pairs: PairVector<Self::F32>;
}

/// Any processor.
#[derive(Debug, Clone, Copy)]
struct Portable;

impl Isa for Portable {
    const FUSED: bool = cfg!(target_arch = "aarch64");
    const WIDE: bool = false;
    type F32 = Array<f32, Self>;
    type Pairs = lane::PairArray<Self>;
}

/// AVX2 with FMA.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx2 {
    const FUSED: bool = true;
    const WIDE: bool = false;
    const NARROW: bool = true;
    type F32 = Array<f32, Self>;
    type Pairs = lane::PairArray<Self>;
}

/// AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx512 {
    const FUSED: bool = true;
    const WIDE: bool = true;
    type F32 = super::vector::Zmm;
    type Pairs = lane::WidenedPairs;
}

/// AVX-512 F with BF16, and with AMX where it has tiles.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Avx512Bf16<const TILES: bool>;

#[cfg(target_arch = "x86_64")]
impl<const TILES: bool> Isa for Avx512Bf16<TILES> {
    const FUSED: bool = true;
    const WIDE: bool = true;
    const TILES: bool = TILES;
    type F32 = super::vector::Zmm;
    type Pairs = lane::Bf16Pairs;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx2,fma")]
fn with_avx512_bf16<const TILES: bool, T: SimdKernel>(kernel: T) -> T::Output {
    kernel.run::<Avx512Bf16<TILES>>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn with_avx512<T: SimdKernel>(kernel: T) -> T::Output {
    kernel.run::<Avx512>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<T: SimdKernel>(kernel: T) -> T::Output {
    kernel.run::<Avx2>()
}
