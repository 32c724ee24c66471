//! [`PixartBlock`]: self-attention, attention to text, MLP. It knows neither how attention is computed nor where the
//! image tokens lie.

use super::config::PixartConfig;
use super::cross::CrossAttention;
use crate::layers::{FeedForward, QkvProjections, attention};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{HiddenState, ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{Attention, AttentionPlan};
use clearform_ops::{gated_add, modulated_layer_norm};
use clearform_weights::TensorSource;

/// A block whose steps are shifted, scaled and gated by one conditioning for all blocks and a table of its own (PixArt,
/// section 2.3: adaLN-single).
pub(super) struct PixartBlock {
    table: Tensor,
    projections: QkvProjections,
    out: Linear,
    cross: CrossAttention,
    mlp: FeedForward,
    attention: Box<dyn Attention>,
    eps: f64,
}

impl PixartBlock {
    /// Loads the block `name` of `source`, with the attention that `plan` has for it.
    pub(super) fn load(
        source: &dyn TensorSource,
        name: &str,
        config: &PixartConfig,
        plan: &AttentionPlan,
    ) -> Result<Self> {
        let builder = WeightBuilder::root(source).pp(name);
        let own = builder.pp("attn1");
        Ok(Self {
            table: builder.shaped("scale_shift_table", &[6, config.width()])?,
            projections: QkvProjections::load(&own, ["to_q", "to_k", "to_v"], ["norm_q", "norm_k"], config.heads)?,
            out: own.linear("to_out.0")?,
            cross: CrossAttention::load(&builder.pp("attn2"), config.heads)?,
            mlp: FeedForward::load(&builder.pp("ff"))?,
            attention: attention(plan, &format!("{name}.attn1"), source)?,
            eps: config.norm_eps,
        })
    }

    /// `modulation` is (batch, 6, width).
    pub(super) fn forward(&self, state: HiddenState, modulation: &Tensor) -> Result<HiddenState> {
        let context = &state.context;
        let text = context.text.as_ref().ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
        let steps = steps(&self.table, modulation)?;
        let [shift, scale, gate, mlp_shift, mlp_scale, mlp_gate] = &steps[..] else {
            return Err(ModelError::bad_input("index", "the table of a block has six rows"));
        };
        let qkv = self.projections.forward(&modulated_layer_norm(&state.image, shift, scale, self.eps)?)?;
        let attended = self.attention.attend(&qkv, None, &context.geometry)?;

        let image = gated_add(&state.image, gate, &self.out.forward(&attended.image.flatten_from(2)?)?)?;
        let image = (&image + self.cross.forward(&image, &text.tokens, text.mask.as_ref())?)?;
        let normed = modulated_layer_norm(&image, mlp_shift, mlp_scale, self.eps)?;
        let image = gated_add(&image, mlp_gate, &self.mlp.forward(&normed)?)?;
        Ok(HiddenState { image, attention: Some(attended), ..state })
    }
}

/// A table's rows, moved by `modulation`.
///
/// # Shapes
/// table (N, width), modulation (batch, N or 1, width) -> N of (batch, width).
pub(super) fn steps(table: &Tensor, modulation: &Tensor) -> Result<Vec<Tensor>> {
    let table = table.to_dtype(modulation.dtype())?.unsqueeze(0)?;
    let moved = table.broadcast_add(modulation)?; // (batch, N, width)
    let row = |index| Ok(moved.narrow(1, index, 1)?.squeeze(1)?.contiguous()?);
    (0..moved.dim(1)?).map(row).collect()
}
