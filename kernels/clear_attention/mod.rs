//! Attention over visited tiles: the kernels and the lists that they read. The main type is [`VisitLists`].

mod layout;
mod lists;
mod masks;
mod pairs;
mod problem;
mod tiles;

pub use layout::{ListEntry, ListRows, SequenceLayout, TextPadding, WorkItem};
pub use lists::{PairEfficiency, VisitLists};
pub use masks::padding;
pub use pairs::{TileVisit, WorkPair, WorkPairs};
pub use problem::{
    BackwardParameters, ForwardParameters, HEAD_DIMS, KernelProblem, ListAddresses, PairedForwardParameters, TensorMap,
};

use crate::{Kernel, PRELUDE, SM90A, Target};

const COMMON: &str = include_str!("common.cuh");
const SOFTMAX: &str = include_str!("softmax.cuh");

/// The forward: outputs, and the log-sum-exp of each query.
pub const FORWARD: Kernel = Kernel {
    name: "clear_attention/forward",
    summary: "windowed attention: outputs and log-sum-exp",
    sources: &[PRELUDE, COMMON, SOFTMAX, include_str!("forward.cu")],
    ptx: include_str!("forward.ptx"),
    cubin: None,
    target: Target::Sm80,
};

/// The forward over [`WorkPairs`] on compute capability 9.0.
pub const FORWARD_SM90A: Kernel = Kernel {
    name: "clear_attention/forward_sm90a",
    summary: "the same for compute capability 9.0, with the tensor memory accelerator and wgmma",
    sources: &[PRELUDE, SM90A, COMMON, SOFTMAX, include_str!("pairs.cuh"), include_str!("forward_sm90a.cu")],
    ptx: include_str!("forward_sm90a.ptx"),
    cubin: Some(include_bytes!("forward_sm90a.cubin")),
    target: Target::Sm90a,
};

/// The backward: gradients of queries, keys and values.
pub const BACKWARD: Kernel = Kernel {
    name: "clear_attention/backward",
    summary: "windowed attention: gradients of queries, keys and values",
    sources: &[PRELUDE, COMMON, include_str!("backward.cu")],
    ptx: include_str!("backward.ptx"),
    cubin: None,
    target: Target::Sm80,
};

#[cfg(test)]
pub(crate) mod tests;
