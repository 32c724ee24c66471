//! [`MinrfBlock`]: attention over rotated queries and keys, then a gated MLP. It knows neither how attention is computed
//! nor where the image tokens lie.

use super::config::MinrfConfig;
use crate::layers::{attention, modulation, split_heads};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{HiddenState, ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{Attention, AttentionPlan, Qkv};
use clearform_ops::reference::rope;
use clearform_ops::{gated_add, modulated_layer_norm};
use clearform_weights::TensorSource;

/// The constant of the norms of queries and keys.
const QK_NORM_EPS: f64 = 1e-5;

/// LLaMA's block under DiT's modulation.
pub(super) struct MinrfBlock {
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

/// A layer norm with weights.
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl MinrfBlock {
    /// Loads the block `name` of `source`, with the attention that `plan` has for it.
    pub(super) fn load(
        source: &dyn TensorSource,
        name: &str,
        config: &MinrfConfig,
        plan: &AttentionPlan,
    ) -> Result<Self> {
        let builder = WeightBuilder::root(source).pp(name);
        let (own, mlp) = (builder.pp("attention"), builder.pp("feed_forward"));
        Ok(Self {
            modulation: builder.linear("adaLN_modulation.1")?,
            attention_norm: LayerNorm::load(&builder.pp("attention_norm"), config.norm_eps)?,
            projections: [own.linear("wq")?, own.linear("wk")?, own.linear("wv")?],
            query_norm: LayerNorm::load(&own.pp("q_norm"), QK_NORM_EPS)?,
            key_norm: LayerNorm::load(&own.pp("k_norm"), QK_NORM_EPS)?,
            out: own.linear("wo")?,
            mlp_norm: LayerNorm::load(&builder.pp("ffn_norm"), config.norm_eps)?,
            mlp: [mlp.linear("w1")?, mlp.linear("w2")?, mlp.linear("w3")?],
            attention: attention(plan, &format!("{name}.attention"), source)?,
            heads: config.heads,
        })
    }

    pub(super) fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        let context = &state.context;
        let [shift, scale, gate, mlp_shift, mlp_scale, mlp_gate] =
            modulation::<6>(&self.modulation, &context.conditioning)?;
        let rotary = context.rotary.as_ref().ok_or_else(|| ModelError::missing_input("hidden_states"))?;
        let qkv = self.qkv(&self.attention_norm.modulated(&state.image, &shift, &scale)?, &rotary.image)?;
        let attended = self.attention.attend(&qkv, None, &context.geometry)?;

        let image = gated_add(&state.image, &gate, &self.out.forward(&attended.image.flatten_from(2)?)?)?;
        let normed = self.mlp_norm.modulated(&image, &mlp_shift, &mlp_scale)?;
        let image = gated_add(&image, &mlp_gate, &self.feed_forward(&normed)?)?;
        Ok(HiddenState { image, attention: Some(attended), ..state })
    }

    /// Queries and keys are normed over all heads together.
    fn qkv(&self, x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Qkv> {
        let [query, key, value] = &self.projections;
        let turned = |linear: &Linear, norm: &LayerNorm| -> Result<Tensor> {
            Ok(rope(&split_heads(&norm.forward(&linear.forward(x)?)?, self.heads)?, cos, sin)?)
        };
        Ok(Qkv {
            query: turned(query, &self.query_norm)?,
            key: turned(key, &self.key_norm)?,
            value: split_heads(&value.forward(x)?, self.heads)?,
        })
    }

    /// SwiGLU (Shazeer, arXiv 2002.05202).
    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, down, up] = &self.mlp;
        Ok(down.forward(&(gate.forward(x)?.silu()? * up.forward(x)?)?)?)
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

    /// (norm(x) weight + bias) (1 + scale) + shift, as one norm without weights.
    ///
    /// # Shapes
    /// x (batch, tokens, width), shift and scale (batch, width) -> as x.
    fn modulated(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let whole = (scale + 1.0)?;
        let scale = (whole.broadcast_mul(&self.weight.to_dtype(x.dtype())?)? - 1.0)?;
        let shift = (whole.broadcast_mul(&self.bias.to_dtype(x.dtype())?)? + shift)?;
        Ok(modulated_layer_norm(x, &shift, &scale, self.eps)?)
    }
}
