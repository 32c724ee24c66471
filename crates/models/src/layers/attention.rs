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
        let by_head = |projection: &Linear| split_heads(&projection.forward(x)?, self.heads);
        let normed = |projection: &Linear, index: usize| match &self.norms {
            None => by_head(projection),
            Some(norms) => Ok(rms_norm(&by_head(projection)?, &norms[index], super::NORM_EPS)?),
        };
        Ok(Qkv { query: normed(&self.query, 0)?, key: normed(&self.key, 1)?, value: by_head(&self.value)? })
    }
}

/// The attention that `plan` assigns to `layer`, with its learned tensors from `source`.
pub(crate) fn attention(plan: &AttentionPlan, layer: &str, source: &dyn TensorSource) -> Result<Box<dyn Attention>> {
    let learned = |name: &str| match source.info(name) {
        Some(_) => source.tensor(name).map(Some).map_err(candle_core::Error::wrap),
        None => Ok(None),
    };
    Ok(plan.build(layer, &learned, source.products())?)
}

/// Splits the channels into heads.
///
/// # Shapes
/// x (batch, tokens, width) -> (batch, tokens, heads, head_dim).
pub(crate) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, _) = x.dims3()?;
    Ok(x.reshape((batch, tokens, heads, ()))?)
}
