//! [`CpuFeatures`]: the instruction sets of this processor, detected at run time, and [`dispatch`].

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::array::{Array, PairArray};
#[cfg(target_arch = "x86_64")]
use super::avx512::{Bf16Pairs, WidenedPairs, Zmm};
use super::isa::{Isa, SimdKernel};
use candle_core::DType;
use clearform_weights::ProductPrecision;
use std::sync::LazyLock;

/// Runs `kernel` with the best instruction set of this processor.
pub fn dispatch<T: SimdKernel>(kernel: T) -> T::Output {
    CpuFeatures::detect().run(kernel)
}

/// An instruction set that this processor has. There is no value for any other, so code compiled for a set cannot run
/// without it.
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

/// The instruction sets in ascending order.
#[cfg(target_arch = "x86_64")]
const LEVELS: &[IsaLevel] =
    &[IsaLevel::Portable, IsaLevel::Avx2, IsaLevel::Avx512, IsaLevel::Avx512Bf16, IsaLevel::Amx];
#[cfg(not(target_arch = "x86_64"))]
const LEVELS: &[IsaLevel] = &[IsaLevel::Portable];

impl CpuFeatures {
    /// The fastest instruction set of this processor.
    pub fn detect() -> Self {
        static FASTEST: LazyLock<CpuFeatures> = LazyLock::new(|| {
            let fastest = LEVELS.iter().copied().rev().find(|set| set.is_available() && set.is_fast());
            CpuFeatures(fastest.unwrap_or(IsaLevel::Portable))
        });
        *FASTEST
    }

    /// All instruction sets of this processor, in ascending order.
    pub fn available() -> impl Iterator<Item = Self> {
        LEVELS.iter().copied().filter(|set| set.is_available()).map(Self)
    }

    /// Whether dot products of [`Bf16Pair`](super::Bf16Pair)s are instructions.
    pub fn has_bf16_dot(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self.0, IsaLevel::Avx512Bf16 | IsaLevel::Amx);
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether values of `dtype` are multiplied as pairs of bf16, f32 in `precision`.
    pub fn multiplies_pairs(self, dtype: DType, precision: ProductPrecision) -> bool {
        let rounds = dtype == DType::BF16 || (dtype == DType::F32 && precision == ProductPrecision::Bf16);
        rounds && self.has_bf16_dot()
    }

    /// Whether this crate has vector code for it.
    pub fn has_simd(self) -> bool {
        self.0 != IsaLevel::Portable
    }

    /// Whether it is AVX2, whose 16 registers hold the accumulators of few rows.
    pub fn is_avx2_only(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == IsaLevel::Avx2;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Runs `kernel`.
    pub fn run<T: SimdKernel>(self, kernel: T) -> T::Output {
        match self.0 {
            IsaLevel::Portable => kernel.run::<Portable>(),
            // SAFETY: a value exists only where `is_available` detected the features that the callee is compiled for.
            #[cfg(target_arch = "x86_64")]
            IsaLevel::Avx2 => unsafe { with_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            IsaLevel::Avx512Bf16 if const { T::PAIRS } => unsafe { with_avx512_bf16::<false, T>(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            IsaLevel::Amx if const { T::PAIRS } => unsafe { with_avx512_bf16::<true, T>(kernel) },
            // SAFETY: as above; the sets with BF16 include these features.
            #[cfg(target_arch = "x86_64")]
            IsaLevel::Avx512 | IsaLevel::Avx512Bf16 | IsaLevel::Amx => unsafe { with_avx512(kernel) },
        }
    }
}

impl IsaLevel {
    /// Whether this processor has it: exactly the features that the `with_*` functions are compiled for.
    fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Self::Avx2.is_available() && is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_available() && amx::is_available(),
        }
    }

    /// Whether it is faster than the sets before it. On Emerald Rapids VDPBF16PS takes as long as 3.3 multiply-adds in
    /// f32, of which two do the same, so without tiles (virtual machines often hide them) products of bf16 are faster
    /// in f32. Zen 4 and Zen 5 begin as many of it per cycle as of those.
    fn is_fast(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self != Self::Avx512Bf16 || !is_intel();
        #[cfg(not(target_arch = "x86_64"))]
        true
    }
}

/// Whether Intel made this processor.
#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

/// Any processor.
#[derive(Debug, Clone, Copy)]
struct Portable;

impl Isa for Portable {
    const FUSED: bool = cfg!(target_arch = "aarch64");
    const WIDE: bool = false;
    type F32 = Array<f32, Self>;
    type Pairs = PairArray<Self>;
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
    type Pairs = PairArray<Self>;
}

/// AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx512 {
    const FUSED: bool = true;
    const WIDE: bool = true;
    type F32 = Zmm;
    type Pairs = WidenedPairs;
}

/// AVX-512 F and BF16; with `TILES`, AMX too.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Avx512Bf16<const TILES: bool>;

#[cfg(target_arch = "x86_64")]
impl<const TILES: bool> Isa for Avx512Bf16<TILES> {
    const FUSED: bool = true;
    const WIDE: bool = true;
    const TILES: bool = TILES;
    type F32 = Zmm;
    type Pairs = Bf16Pairs;
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
