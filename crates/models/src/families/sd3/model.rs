//! [`Sd3Transformer`]: diffusers' `SD3Transformer2DModel` as a [`Denoiser`].

use super::blocks::{JointBlock, block_name};
use super::config::Sd3Config;
use super::embedders::{LatentEmbedder, TimeTextEmbedder};
use crate::layers::{Blocks, NORM_EPS, checked_batch, expect, grid, modulation, to_latents};
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
    latent_embedder: LatentEmbedder,
    time_text: TimeTextEmbedder,
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
        Ok(Self {
            layers: (0..config.blocks).map(|index| format!("{}.attn", block_name(index))).collect(),
            geometries: Geometries::default(),
            latent_embedder: LatentEmbedder::load(&builder.pp("pos_embed"), &config)?,
            time_text: TimeTextEmbedder::load(&builder.pp("time_text_embed"), &config)?,
            text_embedder: builder.linear("context_embedder")?,
            blocks: Blocks::load(config.blocks, &config, source, plan)?,
            norm_out: builder.linear("norm_out.linear")?,
            proj_out: builder.linear("proj_out")?,
            config,
        })
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
        let image = self.latent_embedder.forward(latents, grid_size)?; // (batch, image tokens, width)
        let conditioning = self.time_text.forward(input, batch)?;
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
