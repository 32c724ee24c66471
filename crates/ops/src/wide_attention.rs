//! [`wide_attention`]: attention of one wide head, as in the middle of an autoencoder. Its channels are too many for the
//! sums of a tile to stay in registers, so it is products of blocks with an online softmax between them.

use crate::kernel::contiguous;
use crate::simd::{Isa, Real as _, SimdKernel, dispatch};
use crate::strided_product::block_product;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Queries and keys of a block: 128 x 2048 scores are 1 MiB, which stay in a cache, and products of 128 rows are at the
/// full rate.
const QUERIES: usize = 128;
const KEYS: usize = 2048;

/// softmax(query keysᵀ / √channels) values (`torch.nn.functional.scaled_dot_product_attention` of one head). Its memory
/// grows with the number of queries and keys, not their product. Nothing that is trained comes before it, so it has no
/// backward.
///
/// # Shapes
/// query (batch, queries, channels), keys and values (batch, keys, channels) -> as query.
///
/// # Errors
/// Shapes that contradict each other, or no keys.
pub fn wide_attention(query: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
    let (batch, _, channels) = query.dims3()?;
    let count = keys.dim(1)?;
    if count == 0 || keys.dims() != [batch, count, channels] || values.dims() != keys.dims() {
        bail!("wide attention: query {:?}, keys {:?}, values {:?}", query.dims(), keys.dims(), values.dims());
    }
    if !query.device().is_cpu() {
        return in_chunks(query, keys, values);
    }
    let [q, k, v] = [query, keys, values].map(|tensor| tensor.to_dtype(DType::F32)?.contiguous());
    q?.apply_op3_no_bwd(&k?, &v?, &WideAttention)?.to_dtype(query.dtype())
}

/// The same by candle, some queries at a time: the scores of a whole image would not fit in memory.
fn in_chunks(query: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
    const CHUNK: usize = 1024;
    let (_, count, channels) = query.dims3()?;
    let keys = (keys.transpose(1, 2)?.contiguous()? / (channels as f64).sqrt())?;
    let attend = |start: usize| {
        let scores = query.narrow(1, start, CHUNK.min(count - start))?.contiguous()?.matmul(&keys)?;
        let highest = scores.max_keepdim(2)?;
        let weights = scores.broadcast_sub(&highest)?.exp()?;
        weights.matmul(values)?.broadcast_div(&weights.sum_keepdim(2)?)
    };
    Tensor::cat(&(0..count).step_by(CHUNK).map(attend).collect::<Result<Vec<_>>>()?, 1)
}

struct WideAttention;

impl CustomOp3 for WideAttention {
    fn name(&self) -> &'static str {
        "wide attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, queries, channels) = lq.shape().dims3()?;
        let [q, k, v] = [contiguous::<f32>(q, lq)?, contiguous::<f32>(k, lk)?, contiguous::<f32>(v, lv)?];
        let keys = lk.dims()[1] * channels;
        let mut out = vec![0.0; q.len()];
        let samples = out.chunks_mut((queries * channels).max(1)).zip(q.chunks((queries * channels).max(1)));
        for ((out, q), (k, v)) in samples.zip(k.chunks(keys.max(1)).zip(v.chunks(keys.max(1)))) {
            let k = transposed_blocks(k, channels);
            let blocks = out.par_chunks_mut(QUERIES * channels).zip(q.par_chunks(QUERIES * channels));
            blocks.for_each(|(out, query)| QueryBlock::new(out, query, channels).attend(&k, v));
        }
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }
}

/// The keys of each block, transposed: (blocks, channels, keys of the block). All keys transposed at once would have rows
/// that are a power of two apart, which share few lines of a cache.
fn transposed_blocks(keys: &[f32], channels: usize) -> Vec<f32> {
    let mut out = vec![0.0; keys.len()];
    let size = KEYS * channels;
    out.par_chunks_mut(size).zip(keys.par_chunks(size)).for_each(|(out, keys)| {
        let width = keys.len() / channels;
        for (index, key) in keys.chunks_exact(channels).enumerate() {
            out[index..].iter_mut().step_by(width).zip(key).for_each(|(out, value)| *out = *value);
        }
    });
    out
}

/// Up to [`QUERIES`] queries, and what they have attended to so far.
struct QueryBlock<'a> {
    /// Weighted sums of values, not divided by the sums of weights yet.
    out: &'a mut [f32],
    query: &'a [f32],
    channels: usize,
    highest: Vec<f32>,
    sums: Vec<f32>,
}

impl<'a> QueryBlock<'a> {
    fn new(out: &'a mut [f32], query: &'a [f32], channels: usize) -> Self {
        let count = query.len() / channels;
        Self { out, query, channels, highest: vec![f32::NEG_INFINITY; count], sums: vec![0.0; count] }
    }

    /// # Shapes
    /// keys as [`transposed_blocks`], values (keys, channels).
    fn attend(mut self, keys: &[f32], values: &[f32]) {
        let Self { channels, .. } = self;
        let count = self.sums.len();
        let mut scores = vec![0.0; count * KEYS.min(keys.len() / channels)];
        let scale = 1.0 / (channels as f32).sqrt();
        for (keys, values) in keys.chunks(KEYS * channels).zip(values.chunks(KEYS * channels)) {
            let width = values.len() / channels;
            let scores = &mut scores[..count * width];
            block_product(scores, [count, channels, width], self.query, keys, [0.0, scale]);
            let [highest, sums] = [&mut self.highest, &mut self.sums];
            dispatch(BlockSoftmax { scores, width, highest, sums, out: self.out, channels });
            block_product(self.out, [count, width, channels], scores, values, [1.0, 1.0]);
        }
        for (row, sum) in self.out.chunks_exact_mut(channels).zip(&self.sums) {
            row.iter_mut().for_each(|value| *value /= sum);
        }
    }
}

/// Turns scores into weights relative to the highest score so far, to which it scales what was summed before (Milakov
/// and Gimelshein, arXiv 1805.02867, algorithm 3).
struct BlockSoftmax<'a> {
    /// (queries, width).
    scores: &'a mut [f32],
    width: usize,
    highest: &'a mut [f32],
    sums: &'a mut [f32],
    /// (queries, channels).
    out: &'a mut [f32],
    channels: usize,
}

impl SimdKernel for BlockSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let rows = self.scores.chunks_exact_mut(self.width).zip(self.out.chunks_exact_mut(self.channels));
        for ((scores, out), (highest, sum)) in rows.zip(self.highest.iter_mut().zip(self.sums)) {
            let new = largest(scores).max(*highest);
            let kept = (*highest - new).exponential::<L>();
            *highest = new;
            *sum = *sum * kept + exponentials::<L>(scores, new);
            out.iter_mut().for_each(|value| *value *= kept);
        }
    }
}

/// Lanes of partial results.
const LANES: usize = 16;

#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane = if *value > *lane { *value } else { *lane });
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |highest, value| highest.max(*value))
}

/// Replaces each value by e^(value - highest), and returns their sum.
#[inline(always)]
fn exponentials<L: Isa>(values: &mut [f32], highest: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *value = (*value - highest).exponential::<L>();
            *lane += *value;
        }
    }
    let rest = rest.iter_mut().map(|value| {
        *value = (*value - highest).exponential::<L>();
        *value
    });
    lanes.iter().sum::<f32>() + rest.sum::<f32>()
}
