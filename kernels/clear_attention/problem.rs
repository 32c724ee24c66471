//! [`KernelProblem`]: extents of a call, the launches that compute it, and the parameters they take. Knows no driver.

use super::{BACKWARD, FORWARD, FORWARD_SM90A, VisitLists, WorkPairs};
use crate::Kernel;
use crate::plan::{KernelParameters, Launch, Refusal, Scalar, THREADS};

/// Heads that the kernels take, ascending. Those between can be given zeros.
pub const HEAD_DIMS: [usize; 2] = [64, 128];

/// One call: queries of (batch, queries, heads, head_dim), keys and values of (batch, keys, heads, head_dim).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelProblem {
    number: Scalar,
    batch: usize,
    heads: usize,
    head_dim: usize,
}

impl KernelProblem {
    /// # Errors
    /// Heads or numbers that no kernel takes.
    pub fn new(number: Scalar, batch: usize, heads: usize, head_dim: usize) -> Result<Self, Refusal> {
        match (number, head_dim) {
            (Scalar::F32, _) => Err(Refusal::Scalar { number }),
            _ if HEAD_DIMS.contains(&head_dim) => Ok(Self { number, batch, heads, head_dim }),
            _ => Err(Refusal::HeadDim { head_dim }),
        }
    }

    /// What is computed.
    pub fn number(&self) -> Scalar {
        self.number
    }

    /// Of a tensor of so many tokens, innermost first: head_dim, heads, tokens, batch.
    pub fn extents(&self, tokens: usize) -> [usize; 4] {
        [self.head_dim, self.heads, tokens, self.batch]
    }

    /// Numbers of `parts`, (batch, heads, slots, 64, head_dim) in f32; `part_lse` has head_dim times fewer.
    pub fn part_numbers(&self, lists: &VisitLists) -> usize {
        self.batch * self.heads * lists.slots * 64 * self.head_dim
    }

    /// Outputs. Parts are to be merged then.
    pub fn forward(&self, lists: &VisitLists) -> Launch {
        self.over(FORWARD, "forward", lists.work.len(), 4 * self.tile_bytes())
    }

    /// The same for compute capability 9.0; it takes [`PairedForwardParameters`].
    pub fn paired_forward(&self, pairs: &WorkPairs) -> Launch {
        // What a multiprocessor does before and after its tiles is shared by some, as long as all have 16 times that much.
        const MULTIPROCESSORS: usize = 132;
        let all = pairs.pairs.len() * self.heads * self.batch;
        let of_block = (all / (MULTIPROCESSORS * 16)).clamp(1, 8);
        // A ring of six tiles of keys and values, and two barriers for each.
        let shared_bytes = 6 * (2 * self.tile_bytes() + 2 * 8);
        let launch = self.over(FORWARD_SM90A, "forward_sm90a", pairs.pairs.len().div_ceil(of_block), shared_bytes);
        Launch { threads: 3 * THREADS, ..launch }
    }

    /// With the joins as work, parts of either forward together. This and the first take [`ForwardParameters`].
    pub fn merge(&self, lists: &VisitLists) -> Launch {
        self.over(FORWARD, "merge", lists.joins.len(), 0)
    }

    /// Σ out · grad of each of `queries`, before the gradients. This and the rest take [`BackwardParameters`].
    ///
    /// # Errors
    /// More than a launch can hold.
    pub fn delta(&self, queries: usize) -> Result<Launch, Refusal> {
        Launch::flat(BACKWARD, self.entry("delta"), self.batch * queries * self.heads * self.head_dim / 8)
    }

    /// Gradients of queries over the forward's lists, then their parts together.
    pub fn query_gradient(&self, lists: &VisitLists) -> [Launch; 2] {
        let tiles = 4 * self.tile_bytes();
        [
            self.over(BACKWARD, "query", lists.work.len(), tiles),
            self.over(BACKWARD, "sum_queries", lists.joins.len(), 0),
        ]
    }

    /// Gradients of keys and values over the lists by keys, then their parts together.
    pub fn key_gradient(&self, lists: &VisitLists) -> [Launch; 2] {
        // Keys and values, two stages of 32 queries and gradients, and their log-sum-exp and delta.
        let tiles = 4 * self.tile_bytes() + 4 * 32 * 4;
        [self.over(BACKWARD, "key", lists.work.len(), tiles), self.over(BACKWARD, "sum_keys", lists.joins.len(), 0)]
    }

    fn tile_bytes(&self) -> usize {
        64 * self.head_dim * 2
    }

    fn entry(&self, kernel: &str) -> String {
        format!("{kernel}_{}_{}", self.number.name(), self.head_dim)
    }

    fn over(&self, kernel: Kernel, name: &str, works: usize, shared_bytes: usize) -> Launch {
        let blocks = [works as u32, self.heads as u32, self.batch as u32];
        Launch { kernel, entry: self.entry(name), blocks, threads: THREADS, shared_bytes: shared_bytes as u32 }
    }
}

/// Addresses of lists on the device; `padding` may be 0 where no text is padded.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListAddresses {
    /// [`VisitLists::work`], or [`VisitLists::joins`] for the second launch.
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

/// Addresses and extents of the forward; `forward.cu` says what they are.
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

/// How a device finds boxes in a tensor, as its driver encodes it.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);

/// Addresses and extents of the forward over [`WorkPairs`]; `pairs.cuh` says what they are.
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

/// Addresses and extents of the backward; `backward.cu` says what they are.
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

// SAFETY: repr(C), field by field as in forward.cu; a test and emulation/attention.h hold both to the same sizes.
unsafe impl KernelParameters for ForwardParameters {}
// SAFETY: the same of pairs.cuh.
unsafe impl KernelParameters for PairedForwardParameters {}
// SAFETY: the same of backward.cu.
unsafe impl KernelParameters for BackwardParameters {}
