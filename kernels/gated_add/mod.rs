//! The CUDA kernel for residual + gate · x.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "gated_add/kernel",
    summary: "residual + gate · x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    cubin: None,
    target: Target::Sm80,
};

/// Parameters, as `kernel.cu` describes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct GatedAddParameters {
    /// 0 to add nothing, for the gradient of x.
    pub residual: u64,
    pub gate: u64,
    pub x: u64,
    pub out: u64,
    pub words: u32,
    pub tokens: u32,
    pub row_words: u32,
}

// SAFETY: repr(C) with the fields of kernel.cu; tests on both sides check the size.
unsafe impl KernelParameters for GatedAddParameters {}

/// `rows` rows of `width`.
///
/// # Errors
/// Rows that are not multiples of 16 bytes.
pub fn launch(scalar: Scalar, rows: usize, width: usize) -> Result<Launch, Refusal> {
    check_width(scalar, width, usize::MAX)?;
    Launch::flat(KERNEL, format!("gated_add_{}", scalar.name()), rows * (width / scalar.elements_per_word()))
}
