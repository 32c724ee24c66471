//! [`MinrfTransformer`]: minRF's `DiT_Llama` as a [`Denoiser`].

use super::blocks::{MinrfBlock, block_name};
use super::config::MinrfConfig;
use crate::layers::{
    Blocks, Mlp, NORM_EPS, checked_batch, grid, labels, modulation, patchify, rotary_tables, sinusoidal_embedding,
    to_latents,
};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, Denoiser, DenoiserInput, HiddenState, Result, Rotary};
use candle_core::{Device, Tensor};
use clearform_attention::{AttentionPlan, Geometries, Geometry};
use clearform_ops::{convolution, group_norm, modulated_layer_norm, silu};
use clearform_weights::TensorSource;
use std::sync::Arc;

/// minRF's `DiT_Llama`.
pub struct MinrfTransformer {
    config: MinrfConfig,
    layers: Vec<String>,
    geometries: Geometries,
    stem: ConvolutionStem,
    embedder: Linear,
    time: Mlp,
    classes: Tensor,
    blocks: Blocks<MinrfBlock>,
    modulation_out: Linear,
    proj_out: Linear,
}

/// `init_conv_seq`: two convolutions before the image is split into patches, each followed by SiLU and a group norm.
struct ConvolutionStem([StemLayer; 2]);

/// A convolution and a group norm of the stem.
struct StemLayer {
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
}

/// Groups of the stem's norms (`nn.GroupNorm(32, ..)`), and PyTorch's default epsilon.
const GROUPS: usize = 32;
const GROUP_EPS: f64 = 1e-5;

impl MinrfTransformer {
    /// Builds the transformer from `source`, with the tensor names of `DiT_Llama`, and the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing.
    pub fn build(config: MinrfConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        Ok(Self {
            layers: (0..config.blocks).map(|index| format!("{}.attention", block_name(index))).collect(),
            geometries: Geometries::default(),
            stem: ConvolutionStem::load(&builder.pp("init_conv_seq"))?,
            embedder: builder.linear("x_embedder")?,
            time: Mlp::load(&builder.pp("t_embedder.mlp"), ["0", "2"])?,
            classes: builder.tensor("y_embedder.embedding_table.weight")?,
            blocks: Blocks::load(config.blocks, &config, source, plan)?,
            modulation_out: builder.linear("final_layer.adaLN_modulation.1")?,
            proj_out: builder.linear("final_layer.linear")?,
            config,
        })
    }

    /// One-dimensional positions: the index of a token in raster order, whatever the width of the image.
    fn rotary(&self, geometry: &Geometry, device: &Device) -> Result<Rotary> {
        let positions: Vec<Vec<f64>> = (0..geometry.tokens()).map(|token| vec![token as f64]).collect();
        let (cos, sin) = rotary_tables(&positions, &[self.config.width / self.config.heads], device)?;
        let tiled = |table: &Tensor| geometry.to_tiles(&table.unsqueeze(0)?)?.squeeze(0);
        let text = (cos.narrow(0, 0, 0)?, sin.narrow(0, 0, 0)?);
        Ok(Rotary { image: (tiled(&cos)?, tiled(&sin)?), text })
    }
}

impl ConvolutionStem {
    fn load(builder: &WeightBuilder) -> Result<Self> {
        let layer = |conv: &str, norm: &str| -> Result<StemLayer> {
            let conv = builder.pp(conv);
            let norm = builder.pp(norm);
            Ok(StemLayer {
                conv_weight: conv.tensor("weight")?,
                conv_bias: conv.tensor("bias")?,
                norm_weight: norm.tensor("weight")?,
                norm_bias: norm.tensor("bias")?,
            })
        };
        Ok(Self([layer("0", "2")?, layer("3", "5")?]))
    }

    /// # Shapes
    /// (batch, channels, height, width) -> (batch, inner width / 2, height, width).
    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.0.iter().try_fold(images.clone(), |x, layer| layer.forward(&x))
    }
}

impl StemLayer {
    /// # Shapes
    /// (batch, inputs, height, width) -> (batch, outputs, height, width).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let x = convolution(x, &self.conv_weight.to_dtype(dtype)?, Some(&self.conv_bias.to_dtype(dtype)?))?;
        Ok(group_norm(&silu(&x)?, GROUPS, &self.norm_weight, &self.norm_bias, GROUP_EPS)?)
    }
}

impl Denoiser for MinrfTransformer {
    fn layer_names(&self) -> &[String] {
        &self.layers
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        let images = &input.latents;
        let config = &self.config;
        let batch = checked_batch(images, &input.timestep, config.in_channels)?;
        let (_, geometry) = grid(images, config.patch_size, &self.geometries)?;
        let image = self.embedder.forward(&patchify(&self.stem.forward(images)?, config.patch_size)?)?;
        let time = self.time.forward(&sinusoidal_embedding(&input.timestep, 0.0, images.dtype())?)?;
        let classes = self.classes.index_select(&labels(input, batch, config.classes)?, 0)?;
        let conditioning = (time + classes.to_dtype(images.dtype())?)?; // (batch, min(width, 1024))
        let rotary = Some(self.rotary(&geometry, images.device())?);
        Ok(HiddenState {
            image: geometry.to_tiles(&image)?, // (batch, image tokens, width)
            text: None,
            attention: None,
            context: Arc::new(BlockContext { conditioning, rotary, text: None, geometry }),
        })
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        self.blocks.get(index)?.forward(state)
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let [shift, scale] = modulation::<2>(&self.modulation_out, &state.context.conditioning)?;
        let normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        to_latents(&self.proj_out.forward(&normed)?, &state.context.geometry, self.config.patch_size)
    }
}
