//! The CUDA kernel for root-mean-square norm of heads, then rotary position embedding, and the gradient of x.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "rms_norm_rope/kernel",
    summary: "root-mean-square norm of heads, then rotary position embedding, and the gradient of x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    cubin: None,
    target: Target::Sm80,
};

/// Parameters, as `kernel.cu` describes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct RmsNormRopeParameters {
    pub x: u64,
    pub weight: u64,
    pub grad: u64,
    /// 0, like `sin`, for the norm without rotation.
    pub cos: u64,
    pub sin: u64,
    pub out: u64,
    pub rows: u32,
    pub tokens: u32,
    pub heads: u32,
    pub width: i32,
    /// As [`lanes`] returns.
    pub lanes: i32,
    pub eps: f32,
}

// SAFETY: repr(C) with the fields of kernel.cu; tests on both sides check the size.
unsafe impl KernelParameters for RmsNormRopeParameters {}

/// Threads that hold a row.
pub fn lanes(scalar: Scalar, width: usize) -> usize {
    width.div_ceil(scalar.elements_per_word()).next_power_of_two()
}

/// `rows` heads of `width`, and the gradient of x.
///
/// # Errors
/// Heads that are not multiples of 16 bytes, or more than a warp holds.
pub fn launches(scalar: Scalar, rows: usize, width: usize) -> Result<[Launch; 2], Refusal> {
    check_width(scalar, width, 32 * scalar.elements_per_word())?;
    let threads = rows * lanes(scalar, width);
    let launch = |name: &str| Launch::flat(KERNEL, format!("{name}_{}", scalar.name()), threads);
    Ok([launch("rms_norm_rope")?, launch("rms_norm_rope_gradient")?])
}
