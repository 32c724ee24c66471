//! The kernel of this folder: root-mean-square norm of heads, then rotation, and the gradient of x. Knows no tensor.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "rms_norm_rope/kernel",
    summary: "root-mean-square norm of heads, then rotation, and the gradient of x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    target: Target::Sm80,
};

/// Addresses and extents; `kernel.cu` says what they are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct RmsNormRopeParameters {
    pub x: u64,
    pub weight: u64,
    pub grad: u64,
    /// 0, and `sin` too: the norm alone.
    pub cos: u64,
    pub sin: u64,
    pub out: u64,
    pub rows: u32,
    pub tokens: u32,
    pub heads: u32,
    pub width: i32,
    /// What [`lanes`] says.
    pub lanes: i32,
    pub eps: f32,
}

// SAFETY: repr(C), field by field as in kernel.cu; a test and emulation/rows.h hold both to the same size.
unsafe impl KernelParameters for RmsNormRopeParameters {}

/// Threads that hold a row.
pub fn lanes(number: Scalar, width: usize) -> usize {
    width.div_ceil(number.per_word()).next_power_of_two()
}

/// `rows` heads of `width`, and the gradient of x.
///
/// # Errors
/// Heads that are not whole multiples of 16 bytes, or more than a warp holds.
pub fn launches(number: Scalar, rows: usize, width: usize) -> Result<[Launch; 2], Refusal> {
    check_width(number, width, 32 * number.per_word())?;
    let threads = rows * lanes(number, width);
    let launch = |name: &str| Launch::flat(KERNEL, format!("{name}_{}", number.name()), threads);
    Ok([launch("rms_norm_rope")?, launch("rms_norm_rope_gradient")?])
}
