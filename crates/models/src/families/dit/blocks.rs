//! [`DitBlock`] and its [`TimeClassEmbedder`]: diffusers' `BasicTransformerBlock` with norm type "ada_norm_zero".

use super::config::DitConfig;
use crate::layers::{
    FeedForward, Mlp, NORM_EPS, QkvProjections, TransformerBlock, attention, modulation, sinusoidal_embedding,
};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{HiddenState, Result};
use candle_core::{DType, Tensor};
use clearform_attention::{Attention, AttentionPlan};
use clearform_ops::{gated_add, modulated_layer_norm};
use clearform_weights::TensorSource;

/// DiT's block with adaLN-Zero (DiT, section 3.2): self-attention, then an MLP, each shifted, scaled and gated.
pub(crate) struct DitBlock {
    embedder: TimeClassEmbedder,
    modulation: Linear,
    projections: QkvProjections,
    out: Linear,
    mlp: FeedForward,
    attention: Box<dyn Attention>,
    mlp_eps: f64,
}

/// diffusers' `CombinedTimestepLabelEmbeddings`: the sum of the timestep and class embeddings. Each block has its own.
struct TimeClassEmbedder {
    time: Mlp,
    classes: Tensor,
    frequency_shift: f64,
}

/// The name of block `index`.
pub(super) fn block_name(index: usize) -> String {
    format!("transformer_blocks.{index}")
}

impl TransformerBlock for DitBlock {
    type Config = DitConfig;

    fn load(config: &DitConfig, source: &dyn TensorSource, plan: &AttentionPlan, index: usize) -> Result<Self> {
        let name = block_name(index);
        let builder = WeightBuilder::root(source).pp(&name);
        let attn = builder.pp("attn1");
        Ok(Self {
            embedder: TimeClassEmbedder::load(&builder.pp("norm1.emb"), config)?,
            modulation: builder.linear("norm1.linear")?,
            projections: QkvProjections::load(&attn, ["to_q", "to_k", "to_v"], ["norm_q", "norm_k"], config.heads)?,
            out: attn.linear("to_out.0")?,
            mlp: FeedForward::load(&builder.pp("ff"))?,
            attention: attention(plan, &format!("{name}.attn1"), source)?,
            mlp_eps: config.norm_eps,
        })
    }
}

impl DitBlock {
    pub(super) fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        let conditioning = self.conditioning(&state)?;
        let [shift, scale, gate, mlp_shift, mlp_scale, mlp_gate] = modulation::<6>(&self.modulation, &conditioning)?;
        let qkv = self.projections.forward(&modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?)?;
        let attended = self.attention.attend(qkv, None, &state.context.geometry)?;

        let image = gated_add(&state.image, &gate, &self.out.forward(&attended.image.flatten_from(2)?)?)?;
        let normed = modulated_layer_norm(&image, &mlp_shift, &mlp_scale, self.mlp_eps)?;
        let image = gated_add(&image, &mlp_gate, &self.mlp.forward(&normed)?)?;
        Ok(HiddenState { image, attention: Some(attended), ..state })
    }

    /// The timestep and class as this block embeds them.
    ///
    /// # Shapes
    /// The result is (batch, width).
    pub(super) fn conditioning(&self, state: &HiddenState) -> Result<Tensor> {
        let column = |index| state.context.conditioning.narrow(1, index, 1)?.flatten_all();
        self.embedder.forward(&column(0)?, &column(1)?.to_dtype(DType::U32)?, state.image.dtype())
    }
}

impl TimeClassEmbedder {
    fn load(builder: &WeightBuilder, config: &DitConfig) -> Result<Self> {
        Ok(Self {
            time: Mlp::load(&builder.pp("timestep_embedder"), ["linear_1", "linear_2"])?,
            classes: builder.shaped("class_embedder.embedding_table.weight", &[config.classes + 1, config.width()])?,
            frequency_shift: config.frequency_shift,
        })
    }

    /// # Shapes
    /// timestep (batch), labels (batch) in u32 -> (batch, width) in `dtype`.
    fn forward(&self, timestep: &Tensor, labels: &Tensor, dtype: DType) -> Result<Tensor> {
        let time = self.time.forward(&sinusoidal_embedding(timestep, self.frequency_shift, dtype)?)?;
        let classes = self.classes.index_select(labels, 0)?.to_dtype(dtype)?;
        Ok((time + classes)?)
    }
}
