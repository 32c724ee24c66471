//! [`DitTransformer`]: diffusers' `DiTTransformer2DModel` as a [`Denoiser`].

use super::blocks::{DitBlock, block_name};
use super::config::DitConfig;
use crate::layers::{Blocks, NORM_EPS, PatchEmbed, checked_batch, grid, labels, modulation, to_latents};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, Denoiser, DenoiserInput, HiddenState, Result};
use candle_core::{DType, Tensor};
use clearform_attention::{AttentionPlan, Geometries};
use clearform_ops::modulated_layer_norm;
use clearform_weights::TensorSource;
use std::sync::Arc;

/// diffusers' `DiTTransformer2DModel`. SiT has the same transformer.
pub struct DitTransformer {
    config: DitConfig,
    layers: Vec<String>,
    geometries: Geometries,
    patches: PatchEmbed,
    blocks: Blocks<DitBlock>,
    modulation_out: Linear,
    proj_out: Linear,
}

impl DitTransformer {
    /// Builds the transformer from `source`, with the tensor names of diffusers, and the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: DitConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        Ok(Self {
            layers: (0..config.blocks).map(|index| format!("{}.attn1", block_name(index))).collect(),
            geometries: Geometries::default(),
            patches: PatchEmbed::load(&builder.pp("pos_embed"), config.patch_size)?,
            blocks: Blocks::load(config.blocks, &config, source, plan)?,
            modulation_out: builder.linear("proj_out_1")?,
            proj_out: builder.linear("proj_out_2")?,
            config,
        })
    }

    /// Timestep and class label. Each block embeds them itself, so that this needs no block; f32 holds labels exactly.
    ///
    /// # Shapes
    /// The result is (batch, 2) in f32.
    fn conditioning(&self, input: &DenoiserInput, batch: usize) -> Result<Tensor> {
        let labels = labels(input, batch, self.config.classes)?.to_dtype(DType::F32)?;
        Ok(Tensor::stack(&[input.timestep.to_dtype(DType::F32)?, labels], 1)?)
    }
}

impl Denoiser for DitTransformer {
    fn layer_names(&self) -> &[String] {
        &self.layers
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        let latents = &input.latents;
        let config = &self.config;
        let batch = checked_batch(latents, &input.timestep, config.in_channels)?;
        let (grid_size, geometry) = grid(latents, config.patch_size, &self.geometries)?;
        let positions = config.positions(grid_size, latents.device())?;
        let image = self.patches.forward(latents, &positions)?;
        let conditioning = self.conditioning(input, batch)?;
        Ok(HiddenState {
            image: geometry.to_tiles(&image)?, // (batch, image tokens, width)
            text: None,
            attention: None,
            context: Arc::new(BlockContext { conditioning, rotary: None, text: None, geometry }),
        })
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        self.blocks.get(index)?.forward(state)
    }

    // As in diffusers, the head uses the conditioning of the first block.
    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let conditioning = self.blocks.get(0)?.conditioning(state)?;
        let [shift, scale] = modulation::<2>(&self.modulation_out, &conditioning)?;
        let normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        to_latents(&self.proj_out.forward(&normed)?, &state.context.geometry, self.config.patch_size)
    }
}
