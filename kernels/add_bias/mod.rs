//! The kernel of this folder: x + bias. Knows no tensor.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "add_bias/kernel",
    summary: "x + bias",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    target: Target::Sm80,
};

/// Addresses and extents; `kernel.cu` says what they are.
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

// SAFETY: repr(C), field by field as in kernel.cu; a test and emulation/rows.h hold both to the same size.
unsafe impl KernelParameters for AddBiasParameters {}

/// `rows` rows of `width`.
///
/// # Errors
/// Rows that are not whole multiples of 16 bytes.
pub fn launch(number: Scalar, rows: usize, width: usize) -> Result<Launch, Refusal> {
    check_width(number, width, usize::MAX)?;
    Launch::flat(KERNEL, format!("add_bias_{}", number.name()), rows * (width / number.per_word()))
}
