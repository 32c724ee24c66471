//! The kernel of this folder: root-mean-square norm of heads, then rotation, and the gradient of x. Knows no tensor.

use crate::{Kernel, PRELUDE, ROWS};

/// The kernel.
pub(crate) const KERNEL: Kernel = Kernel {
    name: "rms_norm_rope/kernel",
    summary: "root-mean-square norm of heads, then rotation, and the gradient of x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    capability: 80,
};
