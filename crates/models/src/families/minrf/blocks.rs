//! [`MinrfBlock`]: minRF's `TransformerBlock`.

use super::config::MinrfConfig;
use crate::layers::{TransformerBlock, attention, modulation, split_heads};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{HiddenState, ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{Attention, AttentionPlan, Qkv};
use clearform_ops::{by_tokens, gated_add, modulated_layer_norm, rope, swiglu};
use clearform_weights::TensorSource;

/// PyTorch's default for `nn.LayerNorm`, which minRF's query and key norms keep.
const QK_NORM_EPS: f64 = 1e-5;

/// A LLaMA block (RoPE, SwiGLU) with DiT's adaLN modulation, and layer norms of queries and keys.
pub(crate) struct MinrfBlock {
    modulation: Linear,
    attention_norm: LayerNorm,
    projections: [Linear; 3],
    query_norm: LayerNorm,
    key_norm: LayerNorm,
    out: Linear,
    mlp_norm: LayerNorm,
    mlp: [Linear; 3],
    attention: Box<dyn Attention>,
    heads: usize,
}

/// PyTorch's `nn.LayerNorm`.
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

/// The name of block `index`.
pub(super) fn block_name(index: usize) -> String {
    format!("layers.{index}")
}

impl TransformerBlock for MinrfBlock {
    type Config = MinrfConfig;

    fn load(config: &MinrfConfig, source: &dyn TensorSource, plan: &AttentionPlan, index: usize) -> Result<Self> {
        let name = block_name(index);
        let builder = WeightBuilder::root(source).pp(&name);
        let attn = builder.pp("attention");
        let mlp = builder.pp("feed_forward");
        Ok(Self {
            modulation: builder.linear("adaLN_modulation.1")?,
            attention_norm: LayerNorm::load(&builder.pp("attention_norm"), config.norm_eps)?,
            projections: [attn.linear("wq")?, attn.linear("wk")?, attn.linear("wv")?],
            query_norm: LayerNorm::load(&attn.pp("q_norm"), QK_NORM_EPS)?,
            key_norm: LayerNorm::load(&attn.pp("k_norm"), QK_NORM_EPS)?,
            out: attn.linear("wo")?,
            mlp_norm: LayerNorm::load(&builder.pp("ffn_norm"), config.norm_eps)?,
            mlp: [mlp.linear("w1")?, mlp.linear("w2")?, mlp.linear("w3")?],
            attention: attention(plan, &format!("{name}.attention"), source)?,
            heads: config.heads,
        })
    }
}

impl MinrfBlock {
    pub(super) fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        let context = &state.context;
        let [shift, scale, gate, mlp_shift, mlp_scale, mlp_gate] =
            modulation::<6>(&self.modulation, &context.conditioning)?;
        let rotary = context.rotary.as_ref().ok_or_else(|| ModelError::missing_input("hidden_states"))?;
        let qkv = self.qkv(&self.attention_norm.modulated(&state.image, &shift, &scale)?, &rotary.image)?;
        let attended = self.attention.attend(qkv, None, &context.geometry)?;

        let image = gated_add(&state.image, &gate, &self.out.forward(&attended.image.flatten_from(2)?)?)?;
        let normed = self.mlp_norm.modulated(&image, &mlp_shift, &mlp_scale)?;
        let image = gated_add(&image, &mlp_gate, &self.feed_forward(&normed)?)?;
        Ok(HiddenState { image, attention: Some(attended), ..state })
    }

    /// Queries and keys are normalised over all heads together, then rotated.
    ///
    /// # Shapes
    /// x (batch, tokens, width) -> each (batch, tokens, heads, head_dim).
    fn qkv(&self, x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Qkv> {
        let [query, key, value] = &self.projections;
        let normed_and_rotated = |linear: &Linear, norm: &LayerNorm| -> Result<Tensor> {
            Ok(rope(&split_heads(&norm.forward(&linear.forward(x)?)?, self.heads)?, cos, sin)?)
        };
        Ok(Qkv {
            query: normed_and_rotated(query, &self.query_norm)?,
            key: normed_and_rotated(key, &self.key_norm)?,
            value: split_heads(&value.forward(x)?, self.heads)?,
        })
    }

    /// SwiGLU (Shazeer, arXiv 2002.05202).
    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, down, up] = &self.mlp;
        let feed_forward = |[x]: [&Tensor; 1]| down.forward(&swiglu(&gate.forward(x)?, &up.forward(x)?)?);
        Ok(by_tokens([x], down.inputs(), feed_forward)?)
    }
}

impl LayerNorm {
    fn load(builder: &WeightBuilder, eps: f64) -> Result<Self> {
        Ok(Self { weight: builder.tensor("weight")?, bias: builder.tensor("bias")?, eps })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let zero = Tensor::zeros((x.dim(0)?, x.dim(2)?), x.dtype(), x.device())?;
        self.modulated(x, &zero, &zero)
    }

    /// (norm(x) weight + bias) (1 + scale) + shift, computed as one modulated norm without weights.
    ///
    /// # Shapes
    /// x (batch, tokens, width), shift and scale (batch, width) -> as x.
    fn modulated(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let factor = (scale + 1.0)?;
        let scale = (factor.broadcast_mul(&self.weight.to_dtype(x.dtype())?)? - 1.0)?;
        let shift = (factor.broadcast_mul(&self.bias.to_dtype(x.dtype())?)? + shift)?;
        Ok(modulated_layer_norm(x, &shift, &scale, self.eps)?)
    }
}
