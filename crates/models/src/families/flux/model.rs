//! [`FluxTransformer`]: diffusers' `FluxTransformer2DModel` as a [`Denoiser`]; and [`FluxTrunk`], the part that
//! ControlNets have in common with it.

use super::blocks::{FluxBlock, block_name};
use super::conditioning::TimeGuidanceTextEmbedder;
use super::config::FluxConfig;
use super::positions::{grids, read_ids};
use crate::layers::{Blocks, NORM_EPS, expect, modulation, rotary_tables};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, Denoiser, DenoiserInput, HiddenState, ModelError, Result, Rotary};
use candle_core::Tensor;
use clearform_attention::{AttentionPlan, Geometries, Geometry};
use clearform_ops::modulated_layer_norm;
use clearform_weights::TensorSource;
use std::sync::Arc;

/// diffusers' `FluxTransformer2DModel`.
pub struct FluxTransformer {
    trunk: FluxTrunk,
    norm_out: Linear,
    proj_out: Linear,
}

/// Embedders and blocks, which the transformer and its ControlNets have in common.
pub(super) struct FluxTrunk {
    config: FluxConfig,
    layers: Vec<String>,
    geometries: Geometries,
    image_embedder: Linear,
    text_embedder: Linear,
    conditioning: TimeGuidanceTextEmbedder,
    blocks: Blocks<FluxBlock>,
}

impl FluxTransformer {
    /// Builds the transformer from `source`, with the tensor names of diffusers, and the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: FluxConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        let norm_out = builder.linear("norm_out.linear")?;
        let proj_out = builder.linear("proj_out")?;
        Ok(Self { trunk: FluxTrunk::build(config, source, plan)?, norm_out, proj_out })
    }

    /// Sizes of the transformer.
    pub fn config(&self) -> &FluxConfig {
        &self.trunk.config
    }
}

impl Denoiser for FluxTransformer {
    fn layer_names(&self) -> &[String] {
        &self.trunk.layers
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        self.trunk.embed(input)
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        self.trunk.block(index, state)
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let [scale, shift] = modulation::<2>(&self.norm_out, &state.context.conditioning)?;
        let normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        Ok(state.context.geometry.to_raster(&self.proj_out.forward(&normed)?)?)
    }
}

impl FluxTrunk {
    pub(super) fn build(config: FluxConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        let blocks = config.double_blocks + config.single_blocks;
        Ok(Self {
            image_embedder: builder.linear("x_embedder")?,
            text_embedder: builder.linear("context_embedder")?,
            conditioning: TimeGuidanceTextEmbedder::load(&builder.pp("time_text_embed"), &config)?,
            blocks: Blocks::load(blocks, &config, source, plan)?,
            layers: (0..blocks).map(|index| format!("{}.attn", block_name(&config, index))).collect(),
            geometries: Geometries::default(),
            config,
        })
    }

    pub(super) fn config(&self) -> &FluxConfig {
        &self.config
    }

    pub(super) fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        let text = check(input, &self.config)?;
        let (geometry, rotary) = self.positions(input)?;
        let latents = geometry.to_tiles(&input.latents)?;
        let context = BlockContext {
            conditioning: self.conditioning.forward(input)?,
            rotary: Some(rotary),
            text: None,
            geometry,
        };
        Ok(HiddenState {
            image: self.image_embedder.forward(&latents)?, // (batch, image tokens, width)
            text: Some(self.text_embedder.forward(&text)?), // (batch, text tokens, width)
            attention: None,
            context: Arc::new(context),
        })
    }

    pub(super) fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        self.blocks.get(index)?.forward(state)
    }

    /// The geometry of the image tokens, and the rotary embeddings of all tokens.
    fn positions(&self, input: &DenoiserInput) -> Result<(Geometry, Rotary)> {
        let axes = &self.config.rope_axes;
        let device = input.latents.device();
        let image_ids = ids(input, "img_ids", input.latents.dim(1)?)?;
        let text_ids = ids(input, "txt_ids", input.conditions.text.as_ref().map_or(Ok(0), |text| text.dim(1))?)?;
        let geometry = self.geometries.get(grids(&image_ids)?);
        let (cos, sin) = rotary_tables(&image_ids, axes, device)?;
        let to_tiles = |table: Tensor| geometry.to_tiles(&table.unsqueeze(0)?)?.squeeze(0);
        let rotary = Rotary { image: (to_tiles(cos)?, to_tiles(sin)?), text: rotary_tables(&text_ids, axes, device)? };
        let masked = input.conditions.text_mask.clone().map(|mask| geometry.clone().with_text_mask(mask));
        Ok((masked.unwrap_or(geometry), rotary))
    }
}

/// Checks the inputs against the sizes of the model, and returns the text in the dtype of the latents.
fn check(input: &DenoiserInput, config: &FluxConfig) -> Result<Tensor> {
    let batch = input.latents.dim(0)?;
    expect("hidden_states", &input.latents, &[Some(batch), None, Some(config.in_channels)])?;
    expect("timestep", &input.timestep, &[Some(batch)])?;
    let conditions = &input.conditions;
    if let Some(pooled) = &conditions.pooled {
        expect("pooled_projections", pooled, &[Some(batch), Some(config.pooled_channels)])?;
    }
    if let Some(guidance) = &conditions.guidance {
        expect("guidance", guidance, &[Some(batch)])?;
    }
    let text = conditions.text.as_ref().ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
    expect("encoder_hidden_states", text, &[Some(batch), None, Some(config.text_channels)])?;
    Ok(text.to_dtype(input.latents.dtype())?)
}

/// The ids `name`, one row per token. Text ids are zero in FLUX and may be omitted.
fn ids(input: &DenoiserInput, name: &str, tokens: usize) -> Result<Vec<Vec<f64>>> {
    let conditions = &input.conditions;
    let ids = match (name, &conditions.image_ids, &conditions.text_ids) {
        ("img_ids", Some(ids), _) | ("txt_ids", _, Some(ids)) => read_ids(name, ids)?,
        ("txt_ids", _, None) => vec![vec![0.0; 3]; tokens],
        _ => return Err(ModelError::missing_input(name)),
    };
    match ids.len() == tokens {
        true => Ok(ids),
        false => Err(ModelError::bad_input(name, format!("expected {tokens} ids, one per token, found {}", ids.len()))),
    }
}
