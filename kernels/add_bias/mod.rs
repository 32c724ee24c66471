//! The CUDA kernel for x + bias.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "add_bias/kernel",
    summary: "x + bias",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    cubin: None,
    target: Target::Sm80,
};

/// Parameters, as `kernel.cu` describes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct AddBiasParameters {
    pub x: u64,
    pub bias: u64,
    /// May be that of x.
    pub out: u64,
    pub words: u32,
    pub row_words: u32,
}

// SAFETY: repr(C) with the fields of kernel.cu; tests on both sides check the size.
unsafe impl KernelParameters for AddBiasParameters {}

/// `rows` rows of `width`.
///
/// # Errors
/// Rows that are not multiples of 16 bytes.
pub fn launch(scalar: Scalar, rows: usize, width: usize) -> Result<Launch, Refusal> {
    check_width(scalar, width, usize::MAX)?;
    Launch::flat(KERNEL, format!("add_bias_{}", scalar.name()), rows * (width / scalar.elements_per_word()))
}
