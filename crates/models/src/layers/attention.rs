//! [`QkvProjections`]: the projections of an attention layer, and [`attention`], its operation.

use crate::Result;
use crate::weight_builder::{Linear, WeightBuilder};
use candle_core::Tensor;
use clearform_attention::{Attention, AttentionPlan, Qkv};
use clearform_ops::rms_norm;
use clearform_weights::TensorSource;

/// to_q, to_k and to_v of diffusers' `Attention`, and per head the RMS norms norm_q and norm_k if they exist.
pub(crate) struct QkvProjections {
    query: Linear,
    key: Linear,
    value: Linear,
    norms: Option<[Tensor; 2]>,
    heads: usize,
}

impl QkvProjections {
    /// Loads the projections `names` (query, key, value) and, if they exist, the norms `norms` (query, key).
    pub(crate) fn load(builder: &WeightBuilder, names: [&str; 3], norms: [&str; 2], heads: usize) -> Result<Self> {
        let [query, key, value] = names;
        let norm = |name: &str| builder.pp(name).tensor("weight");
        let has_norms = builder.pp(norms[0]).has("weight");
        Ok(Self {
            query: builder.linear(query)?,
            key: builder.linear(key)?,
            value: builder.linear(value)?,
            norms: if has_norms { Some([norm(norms[0])?, norm(norms[1])?]) } else { None },
            heads,
        })
    }

    /// Queries, keys and values.
    ///
    /// # Shapes
    /// x (batch, tokens, width) -> each (batch, tokens, heads, head_dim).
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Qkv> {
        let query = split_heads(&self.query.forward(x)?, self.heads)?;
        let key = split_heads(&self.key.forward(x)?, self.heads)?;
        let value = split_heads(&self.value.forward(x)?, self.heads)?;
        match &self.norms {
            None => Ok(Qkv { query, key, value }),
            Some([query_norm, key_norm]) => Ok(Qkv {
                query: rms_norm(&query, query_norm, super::NORM_EPS)?,
                key: rms_norm(&key, key_norm, super::NORM_EPS)?,
                value,
            }),
        }
    }
}

/// The attention that `plan` assigns to `layer`, with its learned tensors from `source`.
pub(crate) fn attention(plan: &AttentionPlan, layer: &str, source: &dyn TensorSource) -> Result<Box<dyn Attention>> {
    let learned = |name: &str| match source.info(name) {
        Some(_) => source.tensor(name).map(Some).map_err(candle_core::Error::wrap),
        None => Ok(None),
    };
    Ok(plan.build(layer, &learned)?)
}

/// Splits the channels into heads.
///
/// # Shapes
/// x (batch, tokens, width) -> (batch, tokens, heads, head_dim).
pub(crate) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, _) = x.dims3()?;
    Ok(x.reshape((batch, tokens, heads, ()))?)
}
