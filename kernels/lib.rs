//! The registry of CUDA kernels. A kernel is its source and what chooses it; nothing here knows a model or a tensor.
//!
//! The main type is [`Kernel`]. No kernel stands here yet: on a CUDA device every operation falls back on plain tensor
//! algebra until the CUDA work adds a folder per kernel and a line per folder to [`KERNELS`].

/// One kernel: what it is called, and its CUDA source, which includes no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Name of the folder and of the entry point.
    pub name: &'static str,
    /// One line for `clearform bench`: what it computes.
    pub summary: &'static str,
    /// Text of `kernel.cu`.
    pub source: &'static str,
    /// Lowest compute capability it runs on, as major · 10 + minor.
    pub capability: u32,
}

/// Every kernel, alphabetically. Empty until the CUDA work fills it.
pub const KERNELS: &[Kernel] = &[];
