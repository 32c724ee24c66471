//! [`PixartBlock`]: diffusers' `BasicTransformerBlock` with norm type "ada_norm_single".

use super::config::PixartConfig;
use super::cross::CrossAttention;
use crate::layers::{FeedForward, QkvProjections, TransformerBlock, attention};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{HiddenState, ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{Attention, AttentionPlan};
use clearform_ops::{add, gated_add, modulated_layer_norm};
use clearform_weights::TensorSource;

/// Self-attention, cross-attention to the text, MLP. Shifts, scales and gates are the sum of a modulation for all
/// blocks and the block's `scale_shift_table` (adaLN-single; PixArt-alpha, arXiv 2310.00426, section 2.3).
pub(crate) struct PixartBlock {
    scale_shift_table: Tensor,
    projections: QkvProjections,
    out: Linear,
    cross: CrossAttention,
    mlp: FeedForward,
    attention: Box<dyn Attention>,
    norm_eps: f64,
}

/// The name of block `index`.
pub(super) fn block_name(index: usize) -> String {
    format!("transformer_blocks.{index}")
}

impl TransformerBlock for PixartBlock {
    type Config = PixartConfig;

    fn load(config: &PixartConfig, source: &dyn TensorSource, plan: &AttentionPlan, index: usize) -> Result<Self> {
        let name = block_name(index);
        let builder = WeightBuilder::root(source).pp(&name);
        let attn = builder.pp("attn1");
        Ok(Self {
            scale_shift_table: builder.shaped("scale_shift_table", &[6, config.width()])?,
            projections: QkvProjections::load(&attn, ["to_q", "to_k", "to_v"], ["norm_q", "norm_k"], config.heads)?,
            out: attn.linear("to_out.0")?,
            cross: CrossAttention::load(&builder.pp("attn2"), config.heads)?,
            mlp: FeedForward::load(&builder.pp("ff"))?,
            attention: attention(plan, &format!("{name}.attn1"), source)?,
            norm_eps: config.norm_eps,
        })
    }
}

impl PixartBlock {
    /// # Shapes
    /// modulation (batch, 6, width).
    pub(super) fn forward(&self, state: HiddenState, modulation: &Tensor) -> Result<HiddenState> {
        let context = &state.context;
        let text = context.text.as_ref().ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
        let rows = modulated_rows(&self.scale_shift_table, modulation)?;
        let [shift, scale, gate, mlp_shift, mlp_scale, mlp_gate] = &rows[..] else {
            return Err(ModelError::bad_input("index", format!("expected six modulation rows, found {}", rows.len())));
        };
        let qkv = self.projections.forward(&modulated_layer_norm(&state.image, shift, scale, self.norm_eps)?)?;
        let attended = self.attention.attend(qkv, None, &context.geometry)?;

        let image = gated_add(&state.image, gate, &self.out.forward(&attended.image.flatten_from(2)?)?)?;
        let image = add(&image, &self.cross.forward(&image, &text.tokens, text.mask.as_ref())?)?;
        let normed = modulated_layer_norm(&image, mlp_shift, mlp_scale, self.norm_eps)?;
        let image = gated_add(&image, mlp_gate, &self.mlp.forward(&normed)?)?;
        Ok(HiddenState { image, attention: Some(attended), ..state })
    }
}

/// The rows of a table plus `modulation`: shifts, scales and gates.
///
/// # Shapes
/// scale_shift_table (N, width), modulation (batch, N or 1, width) -> N of (batch, width).
pub(super) fn modulated_rows(scale_shift_table: &Tensor, modulation: &Tensor) -> Result<Vec<Tensor>> {
    let scale_shift_table = scale_shift_table.to_dtype(modulation.dtype())?.unsqueeze(0)?;
    let sum = scale_shift_table.broadcast_add(modulation)?; // (batch, N, width)
    let row = |index| Ok(sum.narrow(1, index, 1)?.squeeze(1)?.contiguous()?);
    (0..sum.dim(1)?).map(row).collect()
}
