//! The kernel of this folder: GELU by its tanh approximation, and its gradient. Knows no tensor.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "gelu/kernel",
    summary: "GELU by its tanh approximation, and its gradient",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    target: Target::Sm80,
};

/// Addresses and extent; `kernel.cu` says what they are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct GeluParameters {
    pub x: u64,
    pub grad: u64,
    pub out: u64,
    pub words: u32,
}

// SAFETY: repr(C), field by field as in kernel.cu; a test and emulation/rows.h hold both to the same size.
unsafe impl KernelParameters for GeluParameters {}

/// GELU of `count` numbers, and its gradient.
///
/// # Errors
/// Not a whole number of 16 bytes.
pub fn launches(number: Scalar, count: usize) -> Result<[Launch; 2], Refusal> {
    check_width(number, count, usize::MAX)?;
    let launch = |name: &str| Launch::flat(KERNEL, format!("{name}_{}", number.name()), count / number.per_word());
    Ok([launch("gelu")?, launch("gelu_gradient")?])
}
