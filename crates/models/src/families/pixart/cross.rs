//! [`CrossAttention`]: image tokens attend to text. It is neither made local nor trained.

use crate::Result;
use crate::layers::split_heads;
use crate::weight_builder::{Linear, WeightBuilder};
use candle_core::{DType, Tensor};
use candle_nn::ops::softmax;

/// Queries that attend at a time. Bounds the memory of the scores: 300 text tokens and 16 heads take 79 MB in f32.
const QUERIES_AT_ONCE: usize = 4096;

/// diffusers' `Attention` as attn2 of `BasicTransformerBlock`: queries from the image, keys and values from the text.
pub(super) struct CrossAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    heads: usize,
}

impl CrossAttention {
    pub(super) fn load(builder: &WeightBuilder, heads: usize) -> Result<Self> {
        let [query, key, value, out] = ["to_q", "to_k", "to_v", "to_out.0"].map(|name| builder.linear(name));
        Ok(Self { query: query?, key: key?, value: value?, out: out?, heads })
    }

    /// `mask` is 1 for tokens and 0 for padding. Only x gets a gradient: text and these weights are not trained.
    ///
    /// # Shapes
    /// x (batch, tokens, width), text (batch, text tokens, width), mask (batch, text tokens) -> as x.
    pub(super) fn forward(&self, x: &Tensor, text: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let by_head = |tokens: Tensor| -> Result<Tensor> {
            Ok(split_heads(&tokens.to_dtype(DType::F32)?, self.heads)?.transpose(1, 2)?.contiguous()?)
        };
        let query = by_head(self.query.forward(x)?)?; // (batch, heads, tokens, head_dim)
        let key = by_head(self.key.forward(text)?)?.detach(); // (batch, heads, text tokens, head_dim)
        let value = by_head(self.value.forward(text)?)?.detach();
        let tokens = query.dim(2)?;
        let mut chunks = Vec::new();
        for start in (0..tokens).step_by(QUERIES_AT_ONCE) {
            let query = query.narrow(2, start, QUERIES_AT_ONCE.min(tokens - start))?.contiguous()?;
            chunks.push(attend(&query, &key, &value, mask)?);
        }
        let attended = Tensor::cat(&chunks, 2)?.transpose(1, 2)?.flatten_from(2)?; // (batch, tokens, width)
        Ok(self.out.forward(&attended.to_dtype(x.dtype())?)?)
    }
}

/// softmax(q kᵀ / √head_dim) v. Scores of masked tokens are lowered by 10000, as in diffusers.
///
/// # Shapes
/// query (batch, heads, tokens, head_dim), key and value (batch, heads, text tokens, head_dim) -> as query.
fn attend(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (query.dim(3)? as f64).sqrt();
    let mut scores = (query.matmul(&key.t()?)? * scale)?; // (batch, heads, tokens, text tokens)
    if let Some(mask) = mask {
        let hidden = mask.to_dtype(DType::F32)?.affine(10000.0, -10000.0)?;
        scores = scores.broadcast_add(&hidden.unsqueeze(1)?.unsqueeze(1)?)?;
    }
    Ok(softmax(&scores, 3)?.matmul(value)?)
}
