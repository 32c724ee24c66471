//! [`DitBlock`] and its [`TimeClassEmbedder`]: diffusers' `BasicTransformerBlock` with norm type "ada_norm_zero".

use super::config::DitConfig;
use crate::layers::{FeedForward, Mlp, NORM_EPS, QkvProjections, attention, modulation, sinusoidal_embedding};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{HiddenState, Result};
use candle_core::{DType, Tensor};
use clearform_attention::{Attention, AttentionPlan};
use clearform_ops::{gated_add, modulated_layer_norm};
use clearform_weights::TensorSource;

/// DiT's block with adaLN-Zero (DiT, section 3.2): self-attention, then an MLP, each shifted, scaled and gated.
pub(super) struct DitBlock {
    pub embedder: TimeClassEmbedder,
    modulation: Linear,
    projections: QkvProjections,
    out: Linear,
    mlp: FeedForward,
    attention: Box<dyn Attention>,
    mlp_eps: f64,
}

/// diffusers' `CombinedTimestepLabelEmbeddings`: the sum of the timestep and class embeddings. Each block has its own.
pub(super) struct TimeClassEmbedder {
    time: Mlp,
    classes: Tensor,
    frequency_shift: f64,
}

impl DitBlock {
    /// Loads the block `name` of `source`, with the attention that `plan` assigns to it.
    pub(super) fn load(
        source: &dyn TensorSource,
        name: &str,
        config: &DitConfig,
        plan: &AttentionPlan,
    ) -> Result<Self> {
        let builder = WeightBuilder::root(source).pp(name);
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

    /// # Shapes
    /// `conditioning`, the output of this block's embedder: (batch, width).
    pub(super) fn forward(&self, state: HiddenState, conditioning: &Tensor) -> Result<HiddenState> {
        let [shift, scale, gate, mlp_shift, mlp_scale, mlp_gate] = modulation::<6>(&self.modulation, conditioning)?;
        let qkv = self.projections.forward(&modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?)?;
        let attended = self.attention.attend(&qkv, None, &state.context.geometry)?;

        let image = gated_add(&state.image, &gate, &self.out.forward(&attended.image.flatten_from(2)?)?)?;
        let normed = modulated_layer_norm(&image, &mlp_shift, &mlp_scale, self.mlp_eps)?;
        let image = gated_add(&image, &mlp_gate, &self.mlp.forward(&normed)?)?;
        Ok(HiddenState { image, attention: Some(attended), ..state })
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
    pub(super) fn forward(&self, timestep: &Tensor, labels: &Tensor, dtype: DType) -> Result<Tensor> {
        let time = self.time.forward(&sinusoidal_embedding(timestep, self.frequency_shift, dtype)?)?;
        let classes = self.classes.index_select(labels, 0)?.to_dtype(dtype)?;
        Ok((time + classes)?)
    }
}
