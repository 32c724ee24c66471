//! [`PixartTransformer`]: diffusers' `PixArtTransformer2DModel` as a [`Denoiser`].

use super::blocks::{PixartBlock, block_name, modulated_rows};
use super::config::PixartConfig;
use crate::layers::{
    Blocks, Mlp, NORM_EPS, PatchEmbed, checked_batch, expect, grid, sincos_positions, sinusoidal_embedding, to_latents,
};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, Conditions, CrossText, Denoiser, DenoiserInput, HiddenState, ModelError, Result};
use candle_core::{DType, Tensor};
use clearform_attention::{AttentionPlan, Geometries};
use clearform_ops::{gelu, modulated_layer_norm};
use clearform_weights::TensorSource;
use std::sync::Arc;

/// diffusers' `PixArtTransformer2DModel`, for PixArt-alpha and PixArt-Sigma.
pub struct PixartTransformer {
    config: PixartConfig,
    layers: Vec<String>,
    geometries: Geometries,
    patches: PatchEmbed,
    conditioning: TimeSizeEmbedder,
    caption: [Linear; 2],
    blocks: Blocks<PixartBlock>,
    scale_shift_table: Tensor,
    proj_out: Linear,
}

/// diffusers' `AdaLayerNormSingle`: embeds the timestep and, for PixArt-alpha, resolution and aspect ratio.
struct TimeSizeEmbedder {
    time: Mlp,
    sizes: Option<[Mlp; 2]>,
    modulation: Linear,
}

impl PixartTransformer {
    /// Builds the transformer from `source`, with the tensor names of diffusers, and the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: PixartConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        let caption = builder.pp("caption_projection");
        Ok(Self {
            layers: (0..config.blocks).map(|index| format!("{}.attn1", block_name(index))).collect(),
            geometries: Geometries::default(),
            patches: PatchEmbed::load(&builder.pp("pos_embed"), config.patch_size)?,
            conditioning: TimeSizeEmbedder::load(&builder.pp("adaln_single"), config.size_conditions)?,
            caption: [caption.linear("linear_1")?, caption.linear("linear_2")?],
            blocks: Blocks::load(config.blocks, &config, source, plan)?,
            scale_shift_table: builder.shaped("scale_shift_table", &[2, config.width()])?,
            proj_out: builder.linear("proj_out")?,
            config,
        })
    }

    /// The projected text (`caption_projection`) and its mask.
    fn text(&self, conditions: &Conditions, batch: usize, dtype: DType) -> Result<CrossText> {
        let text = conditions.text.as_ref().ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
        expect("encoder_hidden_states", text, &[Some(batch), None, Some(self.config.text_channels)])?;
        if let Some(mask) = &conditions.text_mask {
            expect("encoder_attention_mask", mask, &[Some(batch), Some(text.dim(1)?)])?;
        }
        let [up, down] = &self.caption;
        let tokens = down.forward(&gelu(&up.forward(&text.to_dtype(dtype)?)?)?)?;
        Ok(CrossText { tokens, mask: conditions.text_mask.clone() })
    }
}

impl TimeSizeEmbedder {
    fn load(builder: &WeightBuilder, size_conditions: bool) -> Result<Self> {
        let embedders = builder.pp("emb");
        let mlp = |name: &str| Mlp::load(&embedders.pp(name), ["linear_1", "linear_2"]);
        let sizes = || Ok::<_, ModelError>([mlp("resolution_embedder")?, mlp("aspect_ratio_embedder")?]);
        Ok(Self {
            time: mlp("timestep_embedder")?,
            sizes: if size_conditions { Some(sizes()?) } else { None },
            modulation: builder.linear("linear")?,
        })
    }

    /// The six rows that modulate all blocks, then the embedded timestep, which modulates the head.
    ///
    /// # Shapes
    /// The result is (batch, 7, width).
    fn forward(&self, input: &DenoiserInput, batch: usize) -> Result<Tensor> {
        let dtype = input.latents.dtype();
        let mut embedded = self.time.forward(&sinusoidal_embedding(&input.timestep, 0.0, dtype)?)?; // (batch, width)
        if let Some(sizes) = self.embed_sizes(&input.conditions, batch, dtype)? {
            embedded = (embedded + sizes)?;
        }
        let rows = self.modulation.forward(&embedded.silu()?)?.reshape((batch, 6, ()))?;
        Ok(Tensor::cat(&[&rows, &embedded.unsqueeze(1)?], 1)?)
    }

    /// The embedded resolution and aspect ratio, for models that have these conditions.
    ///
    /// # Shapes
    /// The result is (batch, width).
    fn embed_sizes(&self, conditions: &Conditions, batch: usize, dtype: DType) -> Result<Option<Tensor>> {
        match (&self.sizes, &conditions.resolution, &conditions.aspect_ratio) {
            (Some([resolution_embedder, ratio_embedder]), Some(resolution), Some(ratio)) => {
                expect("resolution", resolution, &[Some(batch), Some(2)])?;
                expect("aspect_ratio", ratio, &[Some(batch), Some(1)])?;
                let embed = |mlp: &Mlp, values: &Tensor| -> Result<Tensor> {
                    let embedded = mlp.forward(&sinusoidal_embedding(&values.flatten_all()?, 0.0, dtype)?)?;
                    Ok(embedded.reshape((batch, ()))?)
                };
                let sizes = [embed(resolution_embedder, resolution)?, embed(ratio_embedder, ratio)?];
                Ok(Some(Tensor::cat(&sizes, 1)?))
            }
            (Some(_), None, _) => Err(ModelError::missing_input("resolution")),
            (Some(_), _, None) => Err(ModelError::missing_input("aspect_ratio")),
            (None, None, None) => Ok(None),
            (None, ..) => {
                let reason = "use_additional_conditions is false in this model's config; omit this input";
                Err(ModelError::bad_input("resolution", reason))
            }
        }
    }
}

impl Denoiser for PixartTransformer {
    fn layer_names(&self) -> &[String] {
        &self.layers
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        let latents = &input.latents;
        let config = &self.config;
        let batch = checked_batch(latents, &input.timestep, config.in_channels)?;
        let (grid_size, geometry) = grid(latents, config.patch_size, &self.geometries)?;
        let base = config.sample_size / config.patch_size;
        let positions =
            sincos_positions(grid_size, config.width(), base, config.interpolation_scale, latents.device())?;
        let image = self.patches.forward(latents, &positions)?;
        let conditioning = self.conditioning.forward(input, batch)?;
        let text = Some(self.text(&input.conditions, batch, latents.dtype())?);
        Ok(HiddenState {
            image: geometry.to_tiles(&image)?, // (batch, image tokens, width)
            text: None,
            attention: None,
            context: Arc::new(BlockContext { conditioning, rotary: None, text, geometry }),
        })
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        let modulation = state.context.conditioning.narrow(1, 0, 6)?;
        self.blocks.get(index)?.forward(state, &modulation)
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let rows = modulated_rows(&self.scale_shift_table, &state.context.conditioning.narrow(1, 6, 1)?)?;
        let normed = modulated_layer_norm(&state.image, &rows[0], &rows[1], NORM_EPS)?;
        to_latents(&self.proj_out.forward(&normed)?, &state.context.geometry, self.config.patch_size)
    }
}
