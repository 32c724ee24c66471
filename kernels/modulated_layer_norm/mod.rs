//! The kernel of this folder: layer norm, then modulation, and the gradient of x. Knows no tensor.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, THREADS, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "modulated_layer_norm/kernel",
    summary: "layer norm, then modulation, and the gradient of x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    target: Target::Sm80,
};

/// Numbers of the longest row.
pub const WIDEST: usize = 4096;

/// Addresses and extents; `kernel.cu` says what they are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of kernel.cu")]
pub struct ModulatedLayerNormParameters {
    pub x: u64,
    pub shift: u64,
    pub scale: u64,
    pub grad: u64,
    pub out: u64,
    pub tokens: i32,
    pub width: i32,
    pub eps: f32,
}

// SAFETY: repr(C), field by field as in kernel.cu; a test and emulation/rows.h hold both to the same size.
unsafe impl KernelParameters for ModulatedLayerNormParameters {}

/// The norm of `rows` rows of `width`, and the gradient of x.
///
/// # Errors
/// Rows that are not whole multiples of 16 bytes, or longer than [`WIDEST`].
pub fn launches(number: Scalar, rows: usize, width: usize) -> Result<[Launch; 2], Refusal> {
    check_width(number, width, WIDEST)?;
    let launch = |name: &str| {
        let flat = Launch::flat(KERNEL, format!("{name}_{}", number.name()), rows * THREADS as usize)?;
        Ok(Launch { shared_bytes: 64, ..flat })
    };
    Ok([launch("modulated_layer_norm")?, launch("modulated_layer_norm_gradient")?])
}
