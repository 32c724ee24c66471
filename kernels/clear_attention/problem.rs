//! [`KernelProblem`]: dimensions of a call, the launches that compute it, and their parameters.

use super::{BACKWARD, FORWARD, FORWARD_SM90A, VisitLists, WorkPairs};
use crate::Kernel;
use crate::plan::{KernelParameters, Launch, Refusal, Scalar, THREADS};

/// Head dimensions that the kernels support, ascending. Others can be padded with zeros.
pub const HEAD_DIMS: [usize; 2] = [64, 128];

/// One call: queries of (batch, queries, heads, head_dim), keys and values of (batch, keys, heads, head_dim).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelProblem {
    scalar: Scalar,
    batch: usize,
    heads: usize,
    head_dim: usize,
}

impl KernelProblem {
    /// A call with these dimensions.
    ///
    /// # Errors
    /// A dtype or head dimension that no kernel supports.
    pub fn new(scalar: Scalar, batch: usize, heads: usize, head_dim: usize) -> Result<Self, Refusal> {
        match (scalar, head_dim) {
            (Scalar::F32, _) => Err(Refusal::Scalar { scalar }),
            _ if HEAD_DIMS.contains(&head_dim) => Ok(Self { scalar, batch, heads, head_dim }),
            _ => Err(Refusal::HeadDim { head_dim }),
        }
    }

    /// The dtype of the tensors.
    pub fn scalar(&self) -> Scalar {
        self.scalar
    }

    /// Dimensions of a tensor of so many tokens, innermost first: head_dim, heads, tokens, batch.
    pub fn dims(&self, tokens: usize) -> [usize; 4] {
        [self.head_dim, self.heads, tokens, self.batch]
    }

    /// Elements of `parts`, (batch, heads, slots, 64, head_dim) in f32; `part_lse` has one for each row of head_dim.
    pub fn partial_elements(&self, lists: &VisitLists) -> usize {
        self.batch * self.heads * lists.slots * 64 * self.head_dim
    }

    /// Computes outputs, with partial results to be merged afterwards; takes [`ForwardParameters`].
    pub fn forward(&self, lists: &VisitLists) -> Launch {
        self.over(FORWARD, "forward", lists.work.len(), 4 * self.tile_bytes())
    }

    /// The same for compute capability 9.0; takes [`PairedForwardParameters`].
    pub fn paired_forward(&self, pairs: &WorkPairs) -> Launch {
        // Up to 8 pairs per block share its prologue and epilogue, as long as each multiprocessor still gets 16 blocks,
        // which evens out their different lengths. An H100 has 132 multiprocessors.
        const MULTIPROCESSORS: usize = 132;
        let all = pairs.pairs.len() * self.heads * self.batch;
        let pairs_per_block = (all / (MULTIPROCESSORS * 16)).clamp(1, 8);
        // A ring of six tiles of keys and values, and two barriers for each.
        let shared_bytes = 6 * (2 * self.tile_bytes() + 2 * 8);
        let launch =
            self.over(FORWARD_SM90A, "forward_sm90a", pairs.pairs.len().div_ceil(pairs_per_block), shared_bytes);
        Launch { threads: 3 * THREADS, ..launch }
    }

    /// Merges the partial results of either forward; takes [`ForwardParameters`] with the joins as work.
    pub fn merge(&self, lists: &VisitLists) -> Launch {
        self.over(FORWARD, "merge", lists.joins.len(), 0)
    }

    /// Computes Σ out · grad of each query, which the gradients need; takes [`BackwardParameters`], as the rest do.
    ///
    /// # Errors
    /// More threads than a launch can have.
    pub fn delta(&self, queries: usize) -> Result<Launch, Refusal> {
        Launch::flat(BACKWARD, self.entry("delta"), self.batch * queries * self.heads * self.head_dim / 8)
    }

    /// Computes gradients of queries over the forward's lists, then adds partial results.
    pub fn query_gradient(&self, lists: &VisitLists) -> [Launch; 2] {
        let tiles = 4 * self.tile_bytes();
        [
            self.over(BACKWARD, "query", lists.work.len(), tiles),
            self.over(BACKWARD, "sum_queries", lists.joins.len(), 0),
        ]
    }

    /// Computes gradients of keys and values over the lists by keys, then adds partial results.
    pub fn key_gradient(&self, lists: &VisitLists) -> [Launch; 2] {
        // Keys and values, two stages of 32 queries and gradients, and their log-sum-exp and delta in f32.
        let tiles = 4 * self.tile_bytes() + 4 * 32 * 4;
        [self.over(BACKWARD, "key", lists.work.len(), tiles), self.over(BACKWARD, "sum_keys", lists.joins.len(), 0)]
    }

    fn tile_bytes(&self) -> usize {
        64 * self.head_dim * 2
    }

    fn entry(&self, kernel: &str) -> String {
        format!("{kernel}_{}_{}", self.scalar.name(), self.head_dim)
    }

    /// A launch with one block for each work item, head and batch entry.
    fn over(&self, kernel: Kernel, name: &str, works: usize, shared_bytes: usize) -> Launch {
        let blocks = [works as u32, self.heads as u32, self.batch as u32];
        Launch { kernel, entry: self.entry(name), blocks, threads: THREADS, shared_bytes: shared_bytes as u32 }
    }
}

/// Device addresses of lists; `padding` may be 0 where text is not padded.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListAddresses {
    /// [`VisitLists::work`], or [`VisitLists::joins`] for the launch that merges.
    pub work: u64,
    /// [`VisitLists::entries`].
    pub entries: u64,
    /// [`VisitLists::masks`].
    pub masks: u64,
    /// [`padding`](super::padding) of the call.
    pub padding: u64,
    /// Text tiles of a batch entry.
    pub text_tiles: i32,
}

/// Parameters of the forward, as `forward.cu` describes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of forward.cu, which describes them")]
pub struct ForwardParameters {
    pub query: u64,
    pub key: u64,
    pub value: u64,
    pub out: u64,
    pub lse: u64,
    pub parts: u64,
    pub part_lse: u64,
    pub lists: ListAddresses,
    pub queries: i32,
    pub keys: i32,
    pub slots: i32,
    /// log2(e) / √head_dim.
    pub scale: f32,
}

/// A tensor map (`CUtensorMap`): how the device finds boxes in a tensor, as the driver encodes it.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);

/// Parameters of the forward over [`WorkPairs`], as `pairs.cuh` describes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of pairs.cuh, which describes them")]
pub struct PairedForwardParameters {
    pub key: TensorMap,
    pub value: TensorMap,
    pub forward: ForwardParameters,
    pub pairs: u64,
    pub visits: u64,
    pub count: i32,
}

/// Parameters of the backward, as `backward.cu` describes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of backward.cu, which describes them")]
pub struct BackwardParameters {
    pub query: u64,
    pub key: u64,
    pub value: u64,
    pub out: u64,
    pub grad: u64,
    pub lse: u64,
    pub delta: u64,
    pub query_grad: u64,
    pub key_grad: u64,
    pub value_grad: u64,
    pub parts: u64,
    pub value_parts: u64,
    pub lists: ListAddresses,
    pub batch: i32,
    pub heads: i32,
    pub queries: i32,
    pub keys: i32,
    pub slots: i32,
    /// 1 / √head_dim.
    pub scale: f32,
}

// SAFETY: repr(C) with the fields of forward.cu; tests on both sides check the sizes.
unsafe impl KernelParameters for ForwardParameters {}
// SAFETY: the same for pairs.cuh.
unsafe impl KernelParameters for PairedForwardParameters {}
// SAFETY: the same for backward.cu.
unsafe impl KernelParameters for BackwardParameters {}
