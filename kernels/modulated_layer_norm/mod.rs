//! The CUDA kernel for layer norm, then modulation (adaLN), and the gradient of x.

use crate::plan::{KernelParameters, Launch, Refusal, Scalar, THREADS, check_width};
use crate::{Kernel, PRELUDE, ROWS, Target};

/// The kernel.
pub const KERNEL: Kernel = Kernel {
    name: "modulated_layer_norm/kernel",
    summary: "layer norm, then modulation, and the gradient of x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    cubin: None,
    target: Target::Sm80,
};

/// Elements of the longest supported row.
pub const WIDEST: usize = 4096;

/// Parameters, as `kernel.cu` describes them.
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

// SAFETY: repr(C) with the fields of kernel.cu; tests on both sides check the size.
unsafe impl KernelParameters for ModulatedLayerNormParameters {}

/// The norm of `rows` rows of `width`, and the gradient of x.
///
/// # Errors
/// Rows that are not multiples of 16 bytes, or longer than [`WIDEST`].
pub fn launches(scalar: Scalar, rows: usize, width: usize) -> Result<[Launch; 2], Refusal> {
    check_width(scalar, width, WIDEST)?;
    let launch = |name: &str| {
        let flat = Launch::flat(KERNEL, format!("{name}_{}", scalar.name()), rows * THREADS as usize)?;
        Ok(Launch { shared_bytes: 64, ..flat })
    };
    Ok([launch("modulated_layer_norm")?, launch("modulated_layer_norm_gradient")?])
}
