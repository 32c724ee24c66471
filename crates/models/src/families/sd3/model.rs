//! [`Sd3Transformer`]: embed, blocks, head. It knows neither attention's inside nor any file.

use super::blocks::JointBlock;
use super::config::Sd3Config;
use crate::layers::{Mlp, NORM_EPS, Patches, block_at, checked_batch, expect, grid, modulation, sinusoids, to_latents};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, Denoiser, DenoiserInput, HiddenState, ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{AttentionPlan, Geometries};
use clearform_ops::modulated_layer_norm;
use clearform_weights::TensorSource;
use std::sync::Arc;

/// SD3's transformer.
pub struct Sd3Transformer {
    config: Sd3Config,
    layers: Vec<String>,
    geometries: Geometries,
    patches: Patches,
    positions: Tensor,
    time: Mlp,
    pooled: Mlp,
    text_embedder: Linear,
    blocks: Vec<JointBlock>,
    norm_out: Linear,
    proj_out: Linear,
}

impl Sd3Transformer {
    /// Builds the transformer from `source`, in the names of diffusers' class, with the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing.
    pub fn build(config: Sd3Config, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        let (embedder, edge) = (builder.pp("time_text_embed"), config.positions);
        let mlp = |name: &str| Mlp::load(&embedder.pp(name), ["linear_1", "linear_2"]);
        let block = |index| JointBlock::load(source, &format!("transformer_blocks.{index}"), config.heads, plan);
        Ok(Self {
            layers: (0..config.blocks).map(|index| format!("transformer_blocks.{index}.attn")).collect(),
            geometries: Geometries::default(),
            patches: Patches::load(&builder.pp("pos_embed"), config.patch)?,
            positions: builder.shaped("pos_embed.pos_embed", &[1, edge * edge, config.width()])?,
            time: mlp("timestep_embedder")?,
            pooled: mlp("text_embedder")?,
            text_embedder: builder.linear("context_embedder")?,
            blocks: (0..config.blocks).map(block).collect::<Result<_>>()?,
            norm_out: builder.linear("norm_out.linear")?,
            proj_out: builder.linear("proj_out")?,
            config,
        })
    }

    /// The middle of the table of positions, as large as the picture.
    ///
    /// # Shapes
    /// The result is (1, rows · columns, width).
    fn cropped_positions(&self, (rows, columns): (usize, usize)) -> Result<Tensor> {
        let edge = self.config.positions;
        if rows > edge || columns > edge {
            let most = edge * self.config.patch;
            let reason =
                format!("this model has positions for latents of up to {most} x {most}; draw a smaller picture");
            return Err(ModelError::bad_input("hidden_states", reason));
        }
        let (top, left) = ((edge - rows) / 2, (edge - columns) / 2);
        let table = self.positions.reshape((1, edge, edge, ()))?;
        let middle = table.narrow(1, top, rows)?.narrow(2, left, columns)?;
        Ok(middle.reshape((1, rows * columns, ()))?)
    }

    fn condition(&self, input: &DenoiserInput, batch: usize) -> Result<Tensor> {
        let pooled = &input.conditions.pooled;
        let pooled = pooled.as_ref().ok_or_else(|| ModelError::missing_input("pooled_projections"))?;
        expect("pooled_projections", pooled, &[Some(batch), Some(self.config.pooled_channels)])?;
        let dtype = input.latents.dtype();
        let time = self.time.forward(&sinusoids(&input.timestep, 0.0, dtype)?)?;
        Ok((time + self.pooled.forward(&pooled.to_dtype(dtype)?)?)?) // (batch, width)
    }
}

impl Denoiser for Sd3Transformer {
    fn layers(&self) -> &[String] {
        &self.layers
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        let latents = &input.latents;
        let batch = checked_batch(latents, &input.timestep, self.config.in_channels)?;
        let text = input.conditions.text.as_ref();
        let text = text.ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
        expect("encoder_hidden_states", text, &[Some(batch), None, Some(self.config.text_channels)])?;
        let (extents, geometry) = grid(latents, self.config.patch, &self.geometries)?;
        let image = self.patches.forward(latents, &self.cropped_positions(extents)?)?; // (batch, image tokens, width)
        let conditioning = self.condition(input, batch)?;
        Ok(HiddenState {
            image: geometry.to_tiles(&image)?,
            text: Some(self.text_embedder.forward(&text.to_dtype(latents.dtype())?)?),
            attention: None,
            context: Arc::new(BlockContext { conditioning, rotary: None, text: None, geometry }),
        })
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        block_at(&self.blocks, index)?.forward(state)
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let [scale, shift] = modulation::<2>(&self.norm_out, &state.context.conditioning)?;
        let normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        to_latents(&self.proj_out.forward(&normed)?, &state.context.geometry, self.config.patch)
    }
}
