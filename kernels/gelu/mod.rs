//! The kernel of this folder: GELU by its tanh approximation, and its gradient. Knows no tensor.

use crate::{Kernel, PRELUDE, ROWS};

/// The kernel.
pub(crate) const KERNEL: Kernel = Kernel {
    name: "gelu/kernel",
    summary: "GELU by its tanh approximation, and its gradient",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    capability: 80,
};
