//! [`DitTransformer`]: diffusers' `DiTTransformer2DModel` as a [`Denoiser`].

use super::blocks::DitBlock;
use super::config::DitConfig;
use crate::layers::{NORM_EPS, PatchEmbed, block_at, checked_batch, grid, labels, modulation, to_latents};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, Denoiser, DenoiserInput, HiddenState, Result};
use candle_core::Tensor;
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
    blocks: Vec<DitBlock>,
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
        let block = |index| DitBlock::load(source, &format!("transformer_blocks.{index}"), &config, plan);
        Ok(Self {
            layers: (0..config.blocks).map(|index| format!("transformer_blocks.{index}.attn1")).collect(),
            geometries: Geometries::default(),
            patches: PatchEmbed::load(&builder.pp("pos_embed"), config.patch_size)?,
            blocks: (0..config.blocks).map(block).collect::<Result<_>>()?,
            modulation_out: builder.linear("proj_out_1")?,
            proj_out: builder.linear("proj_out_2")?,
            config,
        })
    }

    /// The embedded timestep and class of every block.
    ///
    /// # Shapes
    /// The result is (batch, blocks, width).
    fn conditioning(&self, input: &DenoiserInput, batch: usize) -> Result<Tensor> {
        let labels = labels(input, batch, self.config.classes)?;
        let dtype = input.latents.dtype();
        let embedded = self.blocks.iter().map(|block| block.embedder.forward(&input.timestep, &labels, dtype));
        Ok(Tensor::stack(&embedded.collect::<Result<Vec<_>>>()?, 1)?)
    }

    /// The conditioning of block `index`.
    ///
    /// # Shapes
    /// The result is (batch, width).
    fn conditioning_of(&self, index: usize, state: &HiddenState) -> Result<Tensor> {
        Ok(state.context.conditioning.narrow(1, index, 1)?.squeeze(1)?.contiguous()?)
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
        let conditioning = self.conditioning_of(index, &state)?;
        block_at(&self.blocks, index)?.forward(state, &conditioning)
    }

    // As in diffusers, the head uses the conditioning of the first block.
    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let [shift, scale] = modulation::<2>(&self.modulation_out, &self.conditioning_of(0, state)?)?;
        let normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        to_latents(&self.proj_out.forward(&normed)?, &state.context.geometry, self.config.patch_size)
    }
}
