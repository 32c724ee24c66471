//! The kernel of this folder: residual + gate · x. Knows no tensor.

use crate::{Kernel, PRELUDE, ROWS};

/// The kernel.
pub(crate) const KERNEL: Kernel = Kernel {
    name: "gated_add/kernel",
    summary: "residual + gate · x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    capability: 80,
};
