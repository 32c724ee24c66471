//! The CUDA kernel for GELU in its tanh approximation, and its gradient.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "gelu/kernel",
    summary: "GELU in its tanh approximation, and its gradient",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    cubin: None,
    target: Target::Sm80,
};

/// Parameters, as `kernel.cu` describes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct GeluParameters {
    pub x: u64,
    pub grad: u64,
    pub out: u64,
    pub words: u32,
}

// SAFETY: repr(C) with the fields of kernel.cu; tests on both sides check the size.
unsafe impl KernelParameters for GeluParameters {}

/// GELU of `count` elements, and its gradient.
///
/// # Errors
/// Not a multiple of 16 bytes.
pub fn launches(scalar: Scalar, count: usize) -> Result<[Launch; 2], Refusal> {
    check_width(scalar, count, usize::MAX)?;
    let launch =
        |name: &str| Launch::flat(KERNEL, format!("{name}_{}", scalar.name()), count / scalar.elements_per_word());
    Ok([launch("gelu")?, launch("gelu_gradient")?])
}
