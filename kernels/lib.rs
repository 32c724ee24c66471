//! The registry of CUDA kernels: their sources, the PTX they compile to, and their launches. Nothing here knows a model
//! or a tensor; only `launch`, behind the feature `cuda`, knows a device.
//!
//! The main types are [`Kernel`] and [`clear_attention::VisitLists`], the tiles that attention visits. README.md
//! describes how to add a kernel and how to check it without a GPU.

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

/// One source, the PTX it compiles to, and for some devices machine code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Its file in this crate, without the extension.
    pub name: &'static str,
    /// One line for `clearform bench`: what it computes.
    pub summary: &'static str,
    /// Source texts in the order in which they are compiled as one; none includes a header.
    pub sources: &'static [&'static str],
    /// PTX for the target by NVRTC 12.4, as `build_ptx.py` writes it.
    pub ptx: &'static str,
    /// The same as machine code, for a kernel of a single compute capability: what was checked is then what runs, where the
    /// driver's own compiler might decide otherwise.
    pub cubin: Option<&'static [u8]>,
    /// Devices it runs on.
    pub target: Target,
}

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Compute capability 8.0 and newer.
    Sm80,
    /// Compute capability 9.0 only.
    Sm90a,
}

impl Target {
    /// Its name in PTX.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
        }
    }

    /// Whether a device of this compute capability (major, minor) runs it.
    pub fn runs_on(self, capability: (i32, i32)) -> bool {
        match self {
            Self::Sm80 => capability >= (8, 0),
            Self::Sm90a => capability == (9, 0),
        }
    }
}

impl Kernel {
    /// Names of the entry points in source order.
    pub fn entries(&self) -> impl Iterator<Item = &'static str> {
        let lines = self.sources.iter().flat_map(|source| source.lines());
        lines.filter_map(|line| line.strip_prefix("ENTRY(")?.split(',').next())
    }
}

/// Every kernel in alphabetical order.
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
