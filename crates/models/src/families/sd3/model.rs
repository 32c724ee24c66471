//! [`Sd3Transformer`]: diffusers' `SD3Transformer2DModel` as a [`Denoiser`].

use super::blocks::{JointBlock, block_name};
use super::config::Sd3Config;
use crate::layers::{
    Blocks, Mlp, NORM_EPS, PatchEmbed, checked_batch, expect, grid, modulation, sinusoidal_embedding, to_latents,
};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, Denoiser, DenoiserInput, HiddenState, ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{AttentionPlan, Geometries};
use clearform_ops::modulated_layer_norm;
use clearform_weights::TensorSource;
use std::sync::Arc;

/// diffusers' `SD3Transformer2DModel`.
pub struct Sd3Transformer {
    config: Sd3Config,
    layers: Vec<String>,
    geometries: Geometries,
    patches: PatchEmbed,
    positions: Tensor,
    time: Mlp,
    pooled: Mlp,
    text_embedder: Linear,
    blocks: Blocks<JointBlock>,
    norm_out: Linear,
    proj_out: Linear,
}

impl Sd3Transformer {
    /// Builds the transformer from `source`, with the tensor names of diffusers, and the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: Sd3Config, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        let embedder = builder.pp("time_text_embed");
        let max_grid = config.max_grid;
        let mlp = |name: &str| Mlp::load(&embedder.pp(name), ["linear_1", "linear_2"]);
        Ok(Self {
            layers: (0..config.blocks).map(|index| format!("{}.attn", block_name(index))).collect(),
            geometries: Geometries::default(),
            patches: PatchEmbed::load(&builder.pp("pos_embed"), config.patch_size)?,
            positions: builder.shaped("pos_embed.pos_embed", &[1, max_grid * max_grid, config.width()])?,
            time: mlp("timestep_embedder")?,
            pooled: mlp("text_embedder")?,
            text_embedder: builder.linear("context_embedder")?,
            blocks: Blocks::load(config.blocks, &config, source, plan)?,
            norm_out: builder.linear("norm_out.linear")?,
            proj_out: builder.linear("proj_out")?,
            config,
        })
    }

    /// The centre of the position embedding table, cropped to the grid (`PatchEmbed.cropped_pos_embed`).
    ///
    /// # Shapes
    /// The result is (1, rows · columns, width).
    fn cropped_positions(&self, (rows, columns): (usize, usize)) -> Result<Tensor> {
        let max_grid = self.config.max_grid;
        if rows > max_grid || columns > max_grid {
            let max_size = max_grid * self.config.patch_size;
            let reason =
                format!("this model supports latents of up to {max_size} x {max_size}; generate a smaller image");
            return Err(ModelError::bad_input("hidden_states", reason));
        }
        let top = (max_grid - rows) / 2;
        let left = (max_grid - columns) / 2;
        let table = self.positions.reshape((1, max_grid, max_grid, ()))?;
        let cropped = table.narrow(1, top, rows)?.narrow(2, left, columns)?;
        Ok(cropped.reshape((1, rows * columns, ()))?)
    }

    /// diffusers' `CombinedTimestepTextProjEmbeddings`: the sum of the timestep and pooled text embeddings.
    ///
    /// # Shapes
    /// The result is (batch, width).
    fn condition(&self, input: &DenoiserInput, batch: usize) -> Result<Tensor> {
        let pooled = &input.conditions.pooled;
        let pooled = pooled.as_ref().ok_or_else(|| ModelError::missing_input("pooled_projections"))?;
        expect("pooled_projections", pooled, &[Some(batch), Some(self.config.pooled_channels)])?;
        let dtype = input.latents.dtype();
        let time = self.time.forward(&sinusoidal_embedding(&input.timestep, 0.0, dtype)?)?;
        Ok((time + self.pooled.forward(&pooled.to_dtype(dtype)?)?)?)
    }
}

impl Denoiser for Sd3Transformer {
    fn layer_names(&self) -> &[String] {
        &self.layers
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        let latents = &input.latents;
        let batch = checked_batch(latents, &input.timestep, self.config.in_channels)?;
        let text = input.conditions.text.as_ref();
        let text = text.ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
        expect("encoder_hidden_states", text, &[Some(batch), None, Some(self.config.text_channels)])?;
        let (grid_size, geometry) = grid(latents, self.config.patch_size, &self.geometries)?;
        let image = self.patches.forward(latents, &self.cropped_positions(grid_size)?)?; // (batch, image tokens, width)
        let conditioning = self.condition(input, batch)?;
        Ok(HiddenState {
            image: geometry.to_tiles(&image)?,
            text: Some(self.text_embedder.forward(&text.to_dtype(latents.dtype())?)?),
            attention: None,
            context: Arc::new(BlockContext { conditioning, rotary: None, text: None, geometry }),
        })
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        self.blocks.get(index)?.forward(state)
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let [scale, shift] = modulation::<2>(&self.norm_out, &state.context.conditioning)?;
        let normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        to_latents(&self.proj_out.forward(&normed)?, &state.context.geometry, self.config.patch_size)
    }
}
