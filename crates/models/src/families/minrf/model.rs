//! [`MinrfTransformer`]: embed, blocks, head. It knows neither attention's inside nor any file.

use super::blocks::MinrfBlock;
use super::config::MinrfConfig;
use crate::layers::{
    Mlp, NORM_EPS, block_at, checked_batch, grid, labels, modulation, patchify, rotary_tables, sinusoids, to_latents,
};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, Denoiser, DenoiserInput, HiddenState, Result, Rotary};
use candle_core::Tensor;
use candle_nn::{Conv2d, Conv2dConfig, GroupNorm, Module as _};
use clearform_attention::{AttentionPlan, Geometries, Geometry};
use clearform_ops::modulated_layer_norm;
use clearform_weights::TensorSource;
use std::sync::Arc;

/// minRF's transformer.
pub struct MinrfTransformer {
    config: MinrfConfig,
    layers: Vec<String>,
    geometries: Geometries,
    stem: ConvolutionStem,
    embedder: Linear,
    time: Mlp,
    classes: Tensor,
    blocks: Vec<MinrfBlock>,
    modulation_out: Linear,
    proj_out: Linear,
}

/// Two convolutions, each followed by SiLU and a norm over groups of channels, before the picture is cut into patches.
struct ConvolutionStem([(Tensor, Tensor, Tensor, Tensor); 2]);

/// Groups of the stem's norms, and their constant.
const GROUPS: usize = 32;
const GROUP_EPS: f64 = 1e-5;

impl MinrfTransformer {
    /// Builds the transformer from `source`, in its own names, with the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing.
    pub fn build(config: MinrfConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        let block = |index| MinrfBlock::load(source, &format!("layers.{index}"), &config, plan);
        Ok(Self {
            layers: (0..config.blocks).map(|index| format!("layers.{index}.attention")).collect(),
            geometries: Geometries::default(),
            stem: ConvolutionStem::load(&builder.pp("init_conv_seq"))?,
            embedder: builder.linear("x_embedder")?,
            time: Mlp::load(&builder.pp("t_embedder.mlp"), ["0", "2"])?,
            classes: builder.tensor("y_embedder.embedding_table.weight")?,
            blocks: (0..config.blocks).map(block).collect::<Result<_>>()?,
            modulation_out: builder.linear("final_layer.adaLN_modulation.1")?,
            proj_out: builder.linear("final_layer.linear")?,
            config,
        })
    }

    /// Tokens are turned by their place in raster order, whatever the picture's width.
    fn rotary(&self, geometry: &Geometry, like: &Tensor) -> Result<Rotary> {
        let places: Vec<Vec<f64>> = (0..geometry.tokens()).map(|place| vec![place as f64]).collect();
        let (cos, sin) = rotary_tables(&places, &[self.config.width / self.config.heads], like.device())?;
        let tiled = |table: &Tensor| geometry.to_tiles(&table.unsqueeze(0)?)?.squeeze(0);
        let text = (cos.narrow(0, 0, 0)?, sin.narrow(0, 0, 0)?);
        Ok(Rotary { image: (tiled(&cos)?, tiled(&sin)?), text })
    }
}

impl ConvolutionStem {
    fn load(builder: &WeightBuilder) -> Result<Self> {
        let step = |conv: &str, norm: &str| -> Result<_> {
            let (conv, norm) = (builder.pp(conv), builder.pp(norm));
            Ok((conv.tensor("weight")?, conv.tensor("bias")?, norm.tensor("weight")?, norm.tensor("bias")?))
        };
        Ok(Self([step("0", "2")?, step("3", "5")?]))
    }

    /// # Shapes
    /// (batch, channels, height, width) -> (batch, width of the model / 2, height, width).
    fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        let mut x = pictures.clone();
        for (weight, bias, scale, shift) in &self.0 {
            let own = |tensor: &Tensor| tensor.to_dtype(x.dtype());
            let config = Conv2dConfig { padding: weight.dim(2)? / 2, ..Conv2dConfig::default() };
            let conv = Conv2d::new(own(weight)?, Some(own(bias)?), config);
            let norm = GroupNorm::new(own(scale)?, own(shift)?, scale.dim(0)?, GROUPS, GROUP_EPS)?;
            x = norm.forward(&conv.forward(&x)?.silu()?)?;
        }
        Ok(x)
    }
}

impl Denoiser for MinrfTransformer {
    fn layers(&self) -> &[String] {
        &self.layers
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        let (pictures, config) = (&input.latents, &self.config);
        let batch = checked_batch(pictures, &input.timestep, config.in_channels)?;
        let (_, geometry) = grid(pictures, config.patch, &self.geometries)?;
        let image = self.embedder.forward(&patchify(&self.stem.forward(pictures)?, config.patch)?)?;
        let time = self.time.forward(&sinusoids(&input.timestep, 0.0, pictures.dtype())?)?;
        let classes = self.classes.index_select(&labels(input, batch, config.classes)?, 0)?;
        let conditioning = (time + classes.to_dtype(pictures.dtype())?)?; // (batch, min(width, 1024))
        let rotary = Some(self.rotary(&geometry, pictures)?);
        Ok(HiddenState {
            image: geometry.to_tiles(&image)?, // (batch, image tokens, width)
            text: None,
            attention: None,
            context: Arc::new(BlockContext { conditioning, rotary, text: None, geometry }),
        })
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        block_at(&self.blocks, index)?.forward(state)
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let [shift, scale] = modulation::<2>(&self.modulation_out, &state.context.conditioning)?;
        let normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        to_latents(&self.proj_out.forward(&normed)?, &state.context.geometry, self.config.patch)
    }
}
