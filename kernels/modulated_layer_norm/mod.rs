//! The kernel of this folder: layer norm, then modulation, and the gradient of x. Knows no tensor.

use crate::{Kernel, PRELUDE, ROWS};

/// The kernel.
pub(crate) const KERNEL: Kernel = Kernel {
    name: "modulated_layer_norm/kernel",
    summary: "layer norm, then modulation, and the gradient of x",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    capability: 80,
};
