//! The CUDA kernel for tokens in another order.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "permute/kernel",
    summary: "tokens in another order",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    cubin: None,
    target: Target::Sm80,
};

/// Parameters, as `kernel.cu` describes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct PermuteParameters {
    pub x: u64,
    pub out: u64,
    pub from: u64,
    pub count: u32,
    pub tokens: u32,
    pub words: u32,
}

// SAFETY: repr(C) with the fields of kernel.cu; tests on both sides check the size.
unsafe impl KernelParameters for PermuteParameters {}

/// `rows` tokens of `width` elements.
///
/// # Errors
/// Tokens that are not multiples of 16 bytes.
pub fn launch(scalar: Scalar, rows: usize, width: usize) -> Result<Launch, Refusal> {
    check_width(scalar, width, usize::MAX)?;
    Launch::flat(KERNEL, "permute".to_owned(), rows * (width / scalar.elements_per_word()))
}
