//! [`AutoencoderKl`]: diffusers' `AutoencoderKL`, images to latents and back (latent diffusion, arXiv 2112.10752,
//! section 3.1), and [`AutoencoderTiny`]. They compute in f32 whatever the dtype of the weights, or with products in bf16.

mod autoencoder;
mod autoencoder_classes;
mod decoder;
mod encoder;
mod layers;
mod levels;
mod padded_tile;
mod tiles;
mod tiling;
mod tiny;

pub use autoencoder::{Autoencoder, AutoencoderSpec, VaePrecision};
pub use autoencoder_classes::{AUTOENCODERS, AutoencoderClass, autoencoder};
pub use tiles::TileProgress;
pub use tiling::{TilingMode, VaeTiling};
pub use tiny::{AutoencoderTiny, TinyConfig};

use crate::config_keys::{ConfigKeys, bad};
use crate::layers::Convolution;
use crate::weight_builder::WeightBuilder;
use crate::{ImageSize, Result};
use candle_core::{DType, Tensor};
use candle_nn::{Conv2dConfig, Module};
use clearform_weights::TensorSource;
use decoder::Decoder;
use encoder::Encoder;
use layers::conv;
use serde_json::Value;
use std::ops::ControlFlow;
use tiles::{TileSizes, TiledNetwork as _};
use tiling::MOST_VALUES;

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
    pub fn build(config: VaeConfig, source: &dyn TensorSource, precision: VaePrecision) -> Result<Self> {
        let builder = WeightBuilder::root(source).in_dtype(precision.dtype());
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

    /// Latents of `images` as the transformer takes them: the mode of `latent_dist`, (mean - shift) · scale. They are
    /// encoded in tiles of `tile` latent pixels a side, if that is given; see [`Self::decode_in_tiles`].
    ///
    /// # Shapes
    /// (batch, 3, height, width) in -1..1 -> (batch, channels, height/downscale, width/downscale) in f32.
    ///
    /// # Errors
    /// A rank or number of channels that is not that of an image.
    pub fn encode(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor> {
        let [mean, _] = self.moments(images, tile)?;
        Ok(((mean - self.config.shift)? * self.config.scale)?)
    }

    /// As [`Self::encode`] without the shift: mean · scale.
    ///
    /// # Shapes
    /// As [`Self::encode`].
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_unshifted(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor> {
        let [mean, _] = self.moments(images, tile)?;
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
    pub fn moments(&self, images: &Tensor, tile: Option<usize>) -> Result<[Tensor; 2]> {
        let images = images.to_dtype(DType::F32)?;
        let encoded = match tile {
            None => self.encoder.whole(&images)?,
            Some(tile) => {
                let (_, _, height, width) = images.dims4()?;
                let measured = self.measured_pixels(ImageSize { height, width });
                let sizes = TileSizes { tile, measured };
                tiles::each_image(&images, |image| {
                    tiles::compute(&self.encoder, image, sizes, &mut |_| ControlFlow::Continue(()))
                })?
                .map_or_else(|| self.encoder.whole(&images), |encoded| encoded.to_device(images.device()))?
            }
        };
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
        Ok(self.decoder.whole(&self.unscaled(latents)?)?)
    }

    /// As [`Self::decode`], in tiles of `tile` latent pixels a side, which take as much memory whatever the size of the
    /// image. `progress` is called after each tile and may cancel, which gives `None`.
    ///
    /// Tiles are computed with the pixels around them that convolutions read, and share the means and variances of group
    /// norms and what they attend to, so there are no seams. These are those of the whole image where it can be decoded
    /// whole in about 3 GB, and of samples of it where it cannot.
    ///
    /// # Shapes
    /// As [`Self::decode`], on the CPU.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_in_tiles(
        &self,
        latents: &Tensor,
        tile: usize,
        progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
    ) -> Result<Option<Tensor>> {
        let raw = self.unscaled(latents)?;
        let (_, _, height, width) = raw.dims4()?;
        let [height, width] = [height, width].map(|edge| edge * self.config.downscale());
        let sizes = TileSizes { tile, measured: self.measured_pixels(ImageSize { height, width }) };
        Ok(tiles::each_image(&raw, |latents| tiles::compute(&self.decoder, latents, sizes, progress))?)
    }

    /// Latent pixels, at most, that fit into memory at a time.
    fn measured_pixels(&self, image: ImageSize) -> usize {
        let values = self.config.largest_activation(image);
        let pixels = image.height * image.width / self.config.downscale().pow(2);
        (MOST_VALUES as f64 / values.max(1) as f64 * pixels as f64) as usize
    }

    /// Latents as the decoder takes them.
    fn unscaled(&self, latents: &Tensor) -> candle_core::Result<Tensor> {
        let raw = ((latents.to_dtype(DType::F32)? / self.config.scale)? + self.config.shift)?;
        match &self.post_quant {
            Some(post_quant) => post_quant.forward(&raw),
            None => Ok(raw),
        }
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
