//! The registry of CUDA kernels. A kernel is its source and the PTX that stands beside it; nothing here knows a model or
//! a tensor, and `launch` alone, behind the feature `cuda`, knows a device.
//!
//! The main types are [`CpuKernel`] and [`clear_attention::VisitLists`], which is what attention visits. README.md says how a
//! kernel is added and how it is checked where there is no GPU.

pub mod add_bias;
pub mod clear_attention;
pub mod gated_add;
pub mod gelu;
#[cfg(feature = "cuda")]
pub mod launch;
pub mod modulated_layer_norm;
pub mod permute;
mod plan;
pub mod rms_norm_rope;

pub use plan::{KernelParameters, Launch, Refusal, Scalar, THREADS};

/// One source: what it is called, what it computes, and what it compiled to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Its file without the extension, under this crate.
    pub name: &'static str,
    /// One line for `clearform bench`: what it computes.
    pub summary: &'static str,
    /// Texts that a compiler gets one after the other; none includes a header.
    pub sources: &'static [&'static str],
    /// What NVRTC 12.4 made of them for the target, as `build_ptx.py` wrote it.
    pub ptx: &'static str,
    /// Devices it runs on.
    pub target: Target,
}

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Compute capability 8.0 and newer.
    Sm80,
    /// Compute capability 9.0, and no other.
    Sm90a,
}

impl Target {
    /// As PTX spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
        }
    }

    /// Whether a device of this compute capability, major and minor, runs it.
    pub fn runs_on(self, capability: (i32, i32)) -> bool {
        match self {
            Self::Sm80 => capability >= (8, 0),
            Self::Sm90a => capability == (9, 0),
        }
    }
}

impl Kernel {
    /// Names of the entry points, in the order of the source.
    pub fn entries(&self) -> impl Iterator<Item = &'static str> {
        let lines = self.sources.iter().flat_map(|source| source.lines());
        lines.filter_map(|line| line.strip_prefix("ENTRY(")?.split(',').next())
    }
}

/// Every kernel, alphabetically.
pub const KERNELS: &[Kernel] = &[
    add_bias::KERNEL,
    clear_attention::BACKWARD,
    clear_attention::FORWARD,
    clear_attention::FORWARD_SM90A,
    gated_add::KERNEL,
    gelu::KERNEL,
    modulated_layer_norm::KERNEL,
    permute::KERNEL,
    rms_norm_rope::KERNEL,
];

const PRELUDE: &str = include_str!("prelude.cuh");
const SM90A: &str = include_str!("sm90a.cuh");
const ROWS: &str = include_str!("rows.cuh");

#[cfg(test)]
mod tests;
