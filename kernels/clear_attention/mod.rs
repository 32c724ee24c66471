//! Attention over tiles that meet: kernels and the lists they read. The main type is [`Lists`]. Knows no tensor.

mod lists;
mod masks;
mod problem;
mod tiles;

pub use lists::{Entry, Lists, Rows, Sequence, Share, Text, Work};
pub use masks::padding;
pub use problem::{BackwardParameters, ForwardParameters, HEAD_DIMS, ListAddresses, Problem};

use crate::{Kernel, PRELUDE};

const COMMON: &str = include_str!("common.cuh");

/// Outputs and the log-sum-exp of each query.
pub const FORWARD: Kernel = Kernel {
    name: "clear_attention/forward",
    summary: "windowed attention: outputs and log-sum-exp",
    sources: &[PRELUDE, COMMON, include_str!("forward.cu")],
    ptx: include_str!("forward.ptx"),
    capability: 80,
};

/// Gradients of queries, keys and values.
pub const BACKWARD: Kernel = Kernel {
    name: "clear_attention/backward",
    summary: "windowed attention: gradients of queries, keys and values",
    sources: &[PRELUDE, COMMON, include_str!("backward.cu")],
    ptx: include_str!("backward.ptx"),
    capability: 80,
};

#[cfg(test)]
mod tests;
