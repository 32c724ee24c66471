//! The kernel of this folder: tokens in another order. Knows no tensor.

use crate::{Kernel, PRELUDE, ROWS};

/// The kernel.
pub(crate) const KERNEL: Kernel = Kernel {
    name: "permute/kernel",
    summary: "tokens in another order",
    sources: &[PRELUDE, ROWS, include_str!("kernel.cu")],
    ptx: include_str!("kernel.ptx"),
    capability: 80,
};
