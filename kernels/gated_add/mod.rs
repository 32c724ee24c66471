//! The kernel of this folder: residual + gate · x. Knows no tensor.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "gated_add/kernel",
    summary: "residual + gate · x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    target: Target::Sm80,
};

/// Addresses and extents; `kernel.cu` says what they are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct GatedAddParameters {
    /// 0: nothing is added, which is the gradient of x.
    pub residual: u64,
    pub gate: u64,
    pub x: u64,
    pub out: u64,
    pub words: u32,
    pub tokens: u32,
    pub row_words: u32,
}

// SAFETY: repr(C), field by field as in kernel.cu; a test and emulation/rows.h hold both to the same size.
unsafe impl KernelParameters for GatedAddParameters {}

/// `rows` rows of `width`.
///
/// # Errors
/// Rows that are not whole multiples of 16 bytes.
pub fn launch(number: Scalar, rows: usize, width: usize) -> Result<Launch, Refusal> {
    check_width(number, width, usize::MAX)?;
    Launch::flat(KERNEL, format!("gated_add_{}", number.name()), rows * (width / number.per_word()))
}
