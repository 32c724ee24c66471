//! [`AutoencoderKl`]: diffusers' `AutoencoderKL`, images to latents and back (latent diffusion, arXiv 2112.10752,
//! section 3.1). It computes in f32 whatever the dtype of the weights.

mod autoencoder;
mod layers;
mod part;

pub use autoencoder::{AUTOENCODERS, Autoencoder, AutoencoderClass, AutoencoderSpec, autoencoder};

use crate::config_keys::{ConfigKeys, bad};
use crate::layers::{Convolution, GroupNorm};
use crate::weight_builder::WeightBuilder;
use crate::{ImageSize, Result};
use candle_core::{D, DType, Tensor};
use candle_nn::{Conv2dConfig, Module};
use clearform_weights::TensorSource;
use layers::{Resnet, SpatialAttention, conv, group_norm};
use part::{NormMoments, OwnMoments, Part};
use serde_json::Value;

/// Sizes of an `AutoencoderKL` and the scaling of its latents, from its config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Channels of an image, in and out.
    pub image_channels: [usize; 2],
    /// Channels of each level, highest resolution first (`block_out_channels`).
    pub level_channels: Vec<usize>,
    /// Residual blocks per level of the encoder (`layers_per_block`); the decoder has one more.
    pub level_blocks: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of every group norm (`norm_num_groups`).
    pub groups: usize,
    /// Whether the middle blocks have self-attention (`mid_block_add_attention`).
    pub attention: bool,
    /// Whether a 1 x 1 convolution follows the encoder, and whether another precedes the decoder.
    pub quant_convs: [bool; 2],
    /// `scaling_factor`: the transformer's latents are (encoded - shift) · scale.
    pub scale: f64,
    /// `shift_factor`; see `scale`.
    pub shift: f64,
    /// Width and height of the training images (`sample_size`).
    pub sample_size: Option<usize>,
}

/// diffusers' `AutoencoderKL`.
#[derive(Debug)]
pub struct AutoencoderKl {
    config: VaeConfig,
    encoder: Encoder,
    decoder: Decoder,
    quant: Option<Convolution>,
    post_quant: Option<Convolution>,
}

impl VaeConfig {
    /// Reads config.json. Absent keys have the defaults of diffusers' class.
    ///
    /// # Errors
    /// A key of the wrong type, or a block type or activation that is not supported.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        keys.expect_all("down_block_types", "DownEncoderBlock2D")?;
        keys.expect_all("up_block_types", "UpDecoderBlock2D")?;
        let activation = keys.text("act_fn", "silu")?;
        if activation != "silu" {
            return Err(bad("act_fn", format!("{activation:?} is not supported, only \"silu\"")));
        }
        let read = Self {
            image_channels: [keys.count("in_channels", 3)?, keys.count("out_channels", 3)?],
            level_channels: keys.counts("block_out_channels", &[64])?,
            level_blocks: keys.count("layers_per_block", 1)?,
            latent_channels: keys.count("latent_channels", 4)?,
            groups: keys.count("norm_num_groups", 32)?,
            attention: keys.flag("mid_block_add_attention", true)?,
            quant_convs: [keys.flag("use_quant_conv", true)?, keys.flag("use_post_quant_conv", true)?],
            scale: keys.number("scaling_factor", 0.18215)?,
            shift: keys.number("shift_factor", 0.0)?,
            sample_size: keys.optional_count("sample_size")?,
        };
        read.check()
    }

    /// Width and height of a latent pixel in image pixels (`vae_scale_factor`).
    pub fn downscale(&self) -> usize {
        1 << (self.level_channels.len() - 1)
    }

    /// Elements of the largest tensor while an image of this size in pixels is decoded, one image at a time. The decoder
    /// doubles the size after each level but the last, with the channels of that level.
    pub fn largest_activation(&self, image: ImageSize) -> usize {
        // A convolution computed in bands pads its input by a pixel on each side.
        let padded = |edge: usize, level: usize| (edge >> level) + 2;
        let at_level = |level: usize| {
            let upsampled = self.level_channels.get(level + 1).copied().unwrap_or(0);
            padded(image.height, level) * padded(image.width, level) * upsampled.max(self.level_channels[level])
        };
        (0..self.level_channels.len()).map(at_level).max().unwrap_or(0)
    }

    fn check(self) -> Result<Self> {
        let levels = &self.level_channels;
        let groups = self.groups;
        if levels.is_empty() || levels.len() > 8 {
            return Err(bad("block_out_channels", format!("expected 1 to 8 levels, found {}", levels.len())));
        }
        if groups == 0 || levels.iter().any(|channels| *channels == 0 || channels % groups != 0) {
            let reason = format!("expected a divisor of every entry of block_out_channels {levels:?}, found {groups}");
            return Err(bad("norm_num_groups", reason));
        }
        if self.scale == 0.0 {
            return Err(bad("scaling_factor", "expected a number other than 0, found 0"));
        }
        Ok(self)
    }
}

impl AutoencoderKl {
    /// Builds the autoencoder from `source`, with the tensor names of diffusers.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: VaeConfig, source: &dyn TensorSource) -> Result<Self> {
        let builder = WeightBuilder::root(source).in_dtype(DType::F32);
        let latent = config.latent_channels;
        let load_1x1_conv = |wanted: bool, name, channels| {
            let load = || conv(&builder.pp(name), [channels, channels, 1], Conv2dConfig::default());
            wanted.then(load).transpose()
        };
        Ok(Self {
            quant: load_1x1_conv(config.quant_convs[0], "quant_conv", 2 * latent)?,
            post_quant: load_1x1_conv(config.quant_convs[1], "post_quant_conv", latent)?,
            encoder: Encoder::load(&builder.pp("encoder"), &config)?,
            decoder: Decoder::load(&builder.pp("decoder"), &config)?,
            config,
        })
    }

    /// Sizes, and the scaling of the latents.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Latents of `images` as the transformer takes them: the mode of `latent_dist`, (mean - shift) · scale.
    ///
    /// # Shapes
    /// (batch, 3, height, width) in -1..1 -> (batch, channels, height/downscale, width/downscale) in f32.
    ///
    /// # Errors
    /// A rank or number of channels that is not that of an image.
    pub fn encode(&self, images: &Tensor) -> Result<Tensor> {
        let [mean, _] = self.moments(images)?;
        Ok(((mean - self.config.shift)? * self.config.scale)?)
    }

    /// As [`Self::encode`] without the shift: mean · scale.
    ///
    /// # Shapes
    /// As [`Self::encode`].
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_unshifted(&self, images: &Tensor) -> Result<Tensor> {
        let [mean, _] = self.moments(images)?;
        Ok((mean * self.config.scale)?)
    }

    /// Mean and log-variance of the unscaled latents of `images`, clamped to -30..20 as in
    /// `DiagonalGaussianDistribution`.
    ///
    /// # Shapes
    /// As [`Self::encode`], twice.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn moments(&self, images: &Tensor) -> Result<[Tensor; 2]> {
        let encoded = self.encoder.forward(&images.to_dtype(DType::F32)?)?;
        let moments = match &self.quant {
            Some(quant) => quant.forward(&encoded)?,
            None => encoded,
        };
        let channels = self.config.latent_channels;
        Ok([moments.narrow(1, 0, channels)?, moments.narrow(1, channels, channels)?.clamp(-30f32, 20f32)?])
    }

    /// Images of the transformer's latents, latents / scale + shift decoded. Values are about -1..1 and not clamped.
    ///
    /// # Shapes
    /// (batch, channels, height, width) -> (batch, 3, height · downscale, width · downscale) in f32.
    ///
    /// # Errors
    /// A number of channels that is not [`VaeConfig::latent_channels`].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let raw = ((latents.to_dtype(DType::F32)? / self.config.scale)? + self.config.shift)?;
        let raw = match &self.post_quant {
            Some(post_quant) => post_quant.forward(&raw)?,
            None => raw,
        };
        Ok(self.decoder.forward(&raw)?)
    }
}

/// diffusers' `Encoder`.
#[derive(Debug)]
struct Encoder {
    conv_in: Convolution,
    levels: Vec<ResolutionLevel>,
    middle: MidBlock,
    norm_out: GroupNorm,
    conv_out: Convolution,
}

/// diffusers' `Decoder`.
#[derive(Debug)]
struct Decoder {
    conv_in: Convolution,
    middle: MidBlock,
    levels: Vec<ResolutionLevel>,
    norm_out: GroupNorm,
    conv_out: Convolution,
}

/// diffusers' `DownEncoderBlock2D` or `UpDecoderBlock2D`: residual blocks, then the convolution of the downsampler or
/// upsampler, which all levels but the last have.
#[derive(Debug)]
struct ResolutionLevel {
    resnets: Vec<Resnet>,
    resample: Option<Convolution>,
}

/// diffusers' `UNetMidBlock2D`.
#[derive(Debug)]
struct MidBlock {
    first: Resnet,
    attention: Option<SpatialAttention>,
    second: Resnet,
}

/// Sizes of a [`ResolutionLevel`]: channels in and out, residual blocks, groups, and the name and kind of its
/// convolution.
struct ResolutionLevelShape {
    channels: [usize; 2],
    blocks: usize,
    groups: usize,
    resample: Option<(&'static str, Conv2dConfig)>,
}

const SAME_SIZE: Conv2dConfig = Conv2dConfig { padding: 1, stride: 1, dilation: 1, groups: 1, cudnn_fwd_algo: None };
const HALVING: Conv2dConfig = Conv2dConfig { padding: 0, stride: 2, ..SAME_SIZE };

impl Encoder {
    fn load(builder: &WeightBuilder, config: &VaeConfig) -> Result<Self> {
        let channels = &config.level_channels;
        let last = config.level_channels.len() - 1;
        let level = |index: usize| {
            let shape = ResolutionLevelShape {
                channels: [channels[index.saturating_sub(1)], channels[index]],
                blocks: config.level_blocks,
                groups: config.groups,
                resample: (index < last).then_some(("downsamplers.0.conv", HALVING)),
            };
            ResolutionLevel::load(&builder.pp(format!("down_blocks.{index}")), &shape)
        };
        Ok(Self {
            conv_in: conv(&builder.pp("conv_in"), [config.image_channels[0], channels[0], 3], SAME_SIZE)?,
            levels: (0..=last).map(level).collect::<Result<_>>()?,
            middle: MidBlock::load(&builder.pp("mid_block"), channels[last], config)?,
            norm_out: group_norm(&builder.pp("conv_norm_out"), channels[last], config.groups)?,
            conv_out: conv(&builder.pp("conv_out"), [channels[last], 2 * config.latent_channels, 3], SAME_SIZE)?,
        })
    }

    fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let moments = &mut OwnMoments;
        let mut part = Part::whole(self.conv_in.forward(images)?);
        for level in &self.levels {
            part = level.resnets(part, moments)?;
            if let Some(halve) = &level.resample {
                // diffusers' `Downsample2D` pads only the right and bottom edges.
                let padded = part.x.pad_with_zeros(D::Minus1, 0, 1)?.pad_with_zeros(D::Minus2, 0, 1)?;
                part = Part::whole(halve.forward(&padded)?);
            }
        }
        let part = self.middle.forward(part, moments)?;
        self.conv_out.of_activated(&part.x, &moments.affine(&self.norm_out, &part)?, None)
    }
}

impl Decoder {
    fn load(builder: &WeightBuilder, config: &VaeConfig) -> Result<Self> {
        let channels: Vec<usize> = config.level_channels.iter().rev().copied().collect();
        let last = channels.len() - 1;
        let level = |index: usize| {
            let shape = ResolutionLevelShape {
                channels: [channels[index.saturating_sub(1)], channels[index]],
                blocks: config.level_blocks + 1,
                groups: config.groups,
                resample: (index < last).then_some(("upsamplers.0.conv", SAME_SIZE)),
            };
            ResolutionLevel::load(&builder.pp(format!("up_blocks.{index}")), &shape)
        };
        Ok(Self {
            conv_in: conv(&builder.pp("conv_in"), [config.latent_channels, channels[0], 3], SAME_SIZE)?,
            middle: MidBlock::load(&builder.pp("mid_block"), channels[0], config)?,
            levels: (0..=last).map(level).collect::<Result<_>>()?,
            norm_out: group_norm(&builder.pp("conv_norm_out"), channels[last], config.groups)?,
            conv_out: conv(&builder.pp("conv_out"), [channels[last], config.image_channels[1], 3], SAME_SIZE)?,
        })
    }

    fn forward(&self, latents: &Tensor) -> candle_core::Result<Tensor> {
        let moments = &mut OwnMoments;
        let mut part = self.middle.forward(Part::whole(self.conv_in.forward(latents)?), moments)?;
        for level in &self.levels {
            part = level.resnets(part, moments)?;
            if let Some(smooth) = &level.resample {
                part = part.enlarged(|x| smooth.of_upsampled(x))?;
            }
        }
        self.conv_out.of_activated(&part.x, &moments.affine(&self.norm_out, &part)?, None)
    }
}

impl ResolutionLevel {
    fn load(builder: &WeightBuilder, shape: &ResolutionLevelShape) -> Result<Self> {
        let [inputs, outputs] = shape.channels;
        let resnet = |index: usize| {
            let channels = [if index == 0 { inputs } else { outputs }, outputs];
            Resnet::load(&builder.pp(format!("resnets.{index}")), channels, shape.groups)
        };
        let resample = shape.resample.map(|(name, config)| conv(&builder.pp(name), [outputs, outputs, 3], config));
        Ok(Self { resnets: (0..shape.blocks).map(resnet).collect::<Result<_>>()?, resample: resample.transpose()? })
    }

    fn resnets(&self, part: Part, moments: &mut dyn NormMoments) -> candle_core::Result<Part> {
        self.resnets.iter().try_fold(part, |part, resnet| resnet.forward(part, moments))
    }
}

impl MidBlock {
    fn load(builder: &WeightBuilder, channels: usize, config: &VaeConfig) -> Result<Self> {
        let attention = || SpatialAttention::load(&builder.pp("attentions.0"), channels, config.groups);
        Ok(Self {
            first: Resnet::load(&builder.pp("resnets.0"), [channels; 2], config.groups)?,
            attention: config.attention.then(attention).transpose()?,
            second: Resnet::load(&builder.pp("resnets.1"), [channels; 2], config.groups)?,
        })
    }

    fn forward(&self, part: Part, moments: &mut dyn NormMoments) -> candle_core::Result<Part> {
        let mut part = self.first.forward(part, moments)?;
        if let Some(attention) = &self.attention {
            let tokens = attention.tokens(&part, moments)?;
            part.x = attention.forward(&part.x, &tokens, &attention.context(&tokens)?)?;
        }
        self.second.forward(part, moments)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn config_errors_name_the_key() {
        let cases = [
            (json!({"block_out_channels": [16, 24], "norm_num_groups": 16}), "norm_num_groups"),
            (json!({"block_out_channels": []}), "1 to 8 levels"),
            (json!({"act_fn": "relu"}), "act_fn"),
            (json!({"down_block_types": ["AttnDownEncoderBlock2D"]}), "AttnDownEncoderBlock2D"),
        ];
        for (config, expected) in cases {
            let error = VaeConfig::new(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_null_shift_is_zero() {
        let config = VaeConfig::new(&json!({"shift_factor": null, "block_out_channels": [32, 32, 64]})).unwrap();
        assert_eq!((config.shift, config.scale, config.downscale()), (0.0, 0.18215, 4));
    }
}
