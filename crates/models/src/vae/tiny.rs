//! [`AutoencoderTiny`]: diffusers' class of that name, for the small autoencoders TAESD, TAESD3 and TAEF1
//! (github.com/madebyollin/taesd), which decode the latents of a large one at a fraction of its cost. They have no norms
//! and no attention, so an image in tiles is that of the whole.

use super::autoencoder::{Autoencoder, AutoencoderSpec, VaePrecision};
use super::levels::{HALVING, SAME_SIZE};
use super::padded_tile::PaddedTile;
use super::tiles::{self, Area, TileProgress, TiledInput};
use crate::config_keys::{ConfigKeys, bad};
use crate::layers::Convolution;
use crate::weight_builder::WeightBuilder;
use crate::{ImageSize, ModelError, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Conv2dConfig, Module as _};
use clearform_weights::TensorSource;
use serde_json::Value;
use std::ops::ControlFlow;

/// Sizes of an `AutoencoderTiny`, from its config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyConfig {
    /// Channels of an image, in and out.
    image_channels: [usize; 2],
    latent_channels: usize,
    encoder: Vec<TinyLevel>,
    decoder: Vec<TinyLevel>,
    /// Latents are squashed to this range, ±, before they are decoded (`latent_magnitude`).
    magnitude: f64,
    scale: f64,
    shift: f64,
}

/// Channels and residual blocks of a level.
#[derive(Debug, Clone, Copy, PartialEq)]
struct TinyLevel {
    channels: usize,
    blocks: usize,
}

/// diffusers' `AutoencoderTiny`. Files for decoding alone lack the encoder.
#[derive(Debug)]
pub struct AutoencoderTiny {
    config: TinyConfig,
    encoder: Option<TinyEncoder>,
    decoder: TinyDecoder,
}

impl TinyConfig {
    /// Reads config.json. Absent keys have the defaults of diffusers' class.
    ///
    /// # Errors
    /// A key of the wrong type, lists of different lengths, or an activation or upsampling that is not supported.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        for (key, supported) in [("act_fn", "relu"), ("upsample_fn", "nearest")] {
            let found = keys.text(key, supported)?;
            if found != supported {
                return Err(bad(key, format!("{found:?} is not supported, only {supported:?}")));
            }
        }
        if keys.count("upsampling_scaling_factor", 2)? != 2 {
            return Err(bad("upsampling_scaling_factor", "expected 2"));
        }
        let encoder = TinyLevel::all(&keys, "encoder", [1, 3, 3, 3])?;
        let decoder = TinyLevel::all(&keys, "decoder", [3, 3, 3, 1])?;
        if encoder.len() != decoder.len() {
            return Err(bad("num_decoder_blocks", "expected as many levels as in num_encoder_blocks"));
        }
        let scale = keys.number("scaling_factor", 1.0)?;
        if scale == 0.0 {
            return Err(bad("scaling_factor", "expected a number other than 0, found 0"));
        }
        Ok(Self {
            image_channels: [keys.count("in_channels", 3)?, keys.count("out_channels", 3)?],
            latent_channels: keys.count("latent_channels", 4)?,
            encoder,
            decoder,
            magnitude: keys.number("latent_magnitude", 3.0)?,
            scale,
            shift: keys.number("shift_factor", 0.0)?,
        })
    }
}

impl TinyLevel {
    /// The levels of one side, which has `usual` numbers of blocks by default.
    fn all(keys: &ConfigKeys, side: &str, usual: [usize; 4]) -> Result<Vec<Self>> {
        let key = format!("{side}_block_out_channels");
        let channels = keys.counts(&key, &[64; 4])?;
        let blocks = keys.counts(&format!("num_{side}_blocks"), &usual)?;
        if channels.len() != blocks.len() || !(1..=8).contains(&channels.len()) || channels.contains(&0) {
            return Err(bad(&key, format!("expected as many levels as in num_{side}_blocks, 1 to 8")));
        }
        let levels = channels.into_iter().zip(blocks);
        Ok(levels.map(|(channels, blocks)| Self { channels, blocks }).collect())
    }
}

impl AutoencoderSpec for TinyConfig {
    fn latent_channels(&self) -> usize {
        self.latent_channels
    }

    fn downscale(&self) -> usize {
        1 << (self.decoder.len() - 1)
    }

    fn sample_size(&self) -> Option<usize> {
        None
    }

    fn largest_activation(&self, image: ImageSize) -> usize {
        let levels = self.decoder.iter().rev().enumerate();
        let values = |(level, TinyLevel { channels, .. }): (usize, &TinyLevel)| {
            channels * (image.height >> level) * (image.width >> level)
        };
        levels.map(values).max().unwrap_or(0)
    }

    fn build(&self, source: &dyn TensorSource, precision: VaePrecision) -> Result<Box<dyn Autoencoder>> {
        Ok(Box::new(AutoencoderTiny::build(self.clone(), source, precision)?))
    }
}

impl AutoencoderTiny {
    /// Builds the autoencoder from `source`, with the tensor names of diffusers.
    ///
    /// # Errors
    /// A tensor of the decoder, or of an encoder that is there in part, is missing or misshapen.
    pub fn build(config: TinyConfig, source: &dyn TensorSource, precision: VaePrecision) -> Result<Self> {
        let builder = WeightBuilder::root(source).in_dtype(precision.dtype());
        let encoder = builder.pp("encoder.layers");
        let load_encoder = || TinyEncoder::load(Layers { builder: encoder.clone(), next: 0 }, &config);
        Ok(Self {
            encoder: encoder.has("0.weight").then(load_encoder).transpose()?,
            decoder: TinyDecoder::load(Layers { builder: builder.pp("decoder.layers"), next: 0 }, &config)?,
            config,
        })
    }

    /// As [`Autoencoder::encode_unshifted`], not scaled either.
    fn encoded(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor> {
        let encoder = self.encoder.as_ref().ok_or_else(|| {
            let reason =
                "this tiny autoencoder has a decoder alone, which cannot read control images; pass one with both";
            ModelError::bad_input("vae", reason)
        })?;
        let images = images.to_dtype(DType::F32)?;
        let in_tiles = tile.map(|tile| {
            let encode = |tile: PaddedTile| encoder.forward(tile);
            in_tiles(&images, encoder.scale(), [tile, encoder.reach()], &encode, &mut |_| ControlFlow::Continue(()))
        });
        match in_tiles.transpose()?.flatten() {
            Some(encoded) => Ok(encoded.to_device(images.device())?),
            None => Ok(encoder.forward(PaddedTile::whole(images))?),
        }
    }

    /// Latents as the decoder takes them.
    fn unscaled(&self, latents: &Tensor) -> candle_core::Result<Tensor> {
        (latents.to_dtype(DType::F32)? / self.config.scale)? + self.config.shift
    }
}

impl Autoencoder for AutoencoderTiny {
    fn encode(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor> {
        Ok(((self.encoded(images, tile)? - self.config.shift)? * self.config.scale)?)
    }

    fn encode_unshifted(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor> {
        Ok((self.encoded(images, tile)? * self.config.scale)?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(self.decoder.forward(PaddedTile::whole(self.unscaled(latents)?))?)
    }

    fn decode_in_tiles(
        &self,
        latents: &Tensor,
        tile: usize,
        progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
    ) -> Result<Option<Tensor>> {
        let decode = |tile: PaddedTile| self.decoder.forward(tile);
        Ok(in_tiles(&self.unscaled(latents)?, 1, [tile, self.decoder.reach()], &decode, progress)?)
    }
}

/// What `compute` makes of tiles of images, whose sides and margins are in latent pixels. Without norms and attention they
/// share nothing.
fn in_tiles(
    images: &Tensor,
    scale: usize,
    [tile, reach]: [usize; 2],
    compute: &dyn Fn(PaddedTile) -> candle_core::Result<Tensor>,
    progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
) -> candle_core::Result<Option<Tensor>> {
    tiles::each_image(images, |pixels| {
        let input = TiledInput { pixels, scale };
        let [height, width] = input.size()?;
        let compute = |area: &Area| compute(area.tile(input, reach)?)?.to_device(&Device::Cpu);
        tiles::assemble(&Area::tiles([height, width], tile), width, &compute, progress)
    })
}

/// The weights of diffusers' `nn.Sequential`, layer by layer.
struct Layers<'a> {
    builder: WeightBuilder<'a>,
    next: usize,
}

impl Layers<'_> {
    /// Passes over layers without weights.
    fn skip(&mut self, count: usize) {
        self.next += count;
    }

    fn conv(&mut self, [inputs, outputs]: [usize; 2], config: Conv2dConfig, has_bias: bool) -> Result<Convolution> {
        let builder = self.builder.pp(self.next);
        self.next += 1;
        load_conv(&builder, [inputs, outputs], config, has_bias)
    }

    fn blocks(&mut self, level: &TinyLevel) -> Result<Vec<TinyBlock>> {
        let first = self.next;
        self.next += level.blocks;
        let load = |layer: usize| TinyBlock::load(&self.builder.pp(layer), level.channels);
        (first..first + level.blocks).map(load).collect()
    }
}

fn load_conv(
    builder: &WeightBuilder,
    [inputs, outputs]: [usize; 2],
    config: Conv2dConfig,
    has_bias: bool,
) -> Result<Convolution> {
    let bias = has_bias.then(|| builder.shaped("bias", &[outputs])).transpose()?;
    Ok(Convolution::new(builder.shaped("weight", &[outputs, inputs, 3, 3])?, bias, config))
}

/// diffusers' `AutoencoderTinyBlock`: three convolutions with ReLU after each, and a shortcut.
#[derive(Debug)]
struct TinyBlock([Convolution; 3]);

impl TinyBlock {
    /// How far around a pixel it reads.
    const REACH: usize = 3;

    fn load(builder: &WeightBuilder, channels: usize) -> Result<Self> {
        let load = |layer: usize| load_conv(&builder.pp(format!("conv.{layer}")), [channels; 2], SAME_SIZE, true);
        Ok(Self([load(0)?, load(2)?, load(4)?]))
    }

    /// # Shapes
    /// (batch, channels, height, width) -> the same.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let [first, second, third] = &self.0;
        let inner = second.forward(&first.forward(x)?.relu()?)?.relu()?;
        (third.forward(&inner)? + x)?.relu()
    }
}

fn forward_all(blocks: &[TinyBlock], x: Tensor) -> candle_core::Result<Tensor> {
    blocks.iter().try_fold(x, |x, block| block.forward(&x))
}

/// diffusers' `EncoderTiny`.
#[derive(Debug)]
struct TinyEncoder {
    /// Each level's convolution, which halves all but the first, and its residual blocks.
    levels: Vec<(Convolution, Vec<TinyBlock>)>,
    conv_out: Convolution,
}

impl TinyEncoder {
    fn load(mut layers: Layers, config: &TinyConfig) -> Result<Self> {
        let mut levels = Vec::new();
        for (index, level) in config.encoder.iter().enumerate() {
            let conv = match index {
                0 => layers.conv([config.image_channels[0], level.channels], SAME_SIZE, true)?,
                _ => layers.conv([level.channels; 2], Conv2dConfig { padding: 1, ..HALVING }, false)?,
            };
            levels.push((conv, layers.blocks(level)?));
        }
        let last = config.encoder[config.encoder.len() - 1].channels;
        Ok(Self { levels, conv_out: layers.conv([last, config.latent_channels], SAME_SIZE, true)? })
    }

    /// # Shapes
    /// (batch, 3, height, width) in -1..1 with margins -> (batch, latent channels, height / downscale, width / downscale)
    /// without them.
    fn forward(&self, images: PaddedTile) -> candle_core::Result<Tensor> {
        let mut tile = PaddedTile { x: images.x.affine(0.5, 0.5)?, ..images };
        for (index, (conv, blocks)) in self.levels.iter().enumerate() {
            tile = match index {
                0 => PaddedTile { x: conv.forward(&tile.x)?, ..tile },
                _ => tile.halved(|x| conv.forward(x))?,
            };
            tile.x = forward_all(blocks, tile.x)?;
        }
        tile.x = self.conv_out.forward(&tile.x)?;
        Ok(tile.cropped(0)?.x)
    }

    /// Pixels along the side of a latent pixel.
    fn scale(&self) -> usize {
        1 << (self.levels.len() - 1)
    }

    /// How many latent pixels around a part are read.
    fn reach(&self) -> usize {
        let blocks = self.levels.iter().map(|(_, blocks)| TinyBlock::REACH * blocks.len());
        // Each level's convolution reads one of its pixels further, or of those that it halves.
        let pixels: usize = blocks.enumerate().map(|(level, reach)| (reach + 1) << level).sum();
        pixels.div_ceil(self.scale()) + 1
    }
}

/// diffusers' `DecoderTiny`.
#[derive(Debug)]
struct TinyDecoder {
    magnitude: f64,
    conv_in: Convolution,
    /// Each level's residual blocks, and the convolution after its image is enlarged; the last has none.
    levels: Vec<(Vec<TinyBlock>, Option<Convolution>)>,
    conv_out: Convolution,
}

impl TinyDecoder {
    fn load(mut layers: Layers, config: &TinyConfig) -> Result<Self> {
        let last = config.decoder.len() - 1;
        let conv_in = layers.conv([config.latent_channels, config.decoder[0].channels], SAME_SIZE, true)?;
        layers.skip(1); // ReLU
        let mut levels = Vec::new();
        for (index, level) in config.decoder.iter().enumerate() {
            let blocks = layers.blocks(level)?;
            let smooth = match index == last {
                true => None,
                false => {
                    layers.skip(1); // the enlargement
                    Some(layers.conv([level.channels; 2], SAME_SIZE, false)?)
                }
            };
            levels.push((blocks, smooth));
        }
        let conv_out = layers.conv([config.decoder[last].channels, config.image_channels[1]], SAME_SIZE, true)?;
        Ok(Self { magnitude: config.magnitude, conv_in, levels, conv_out })
    }

    /// The image of a part of the latents. Margins are cropped as soon as nothing that remains reads them.
    ///
    /// # Shapes
    /// (batch, channels, height, width) with margins -> (batch, 3, height · upscale, width · upscale) without them.
    fn forward(&self, latents: PaddedTile) -> candle_core::Result<Tensor> {
        let squashed = ((&latents.x / self.magnitude)?.tanh()? * self.magnitude)?;
        let mut tile = PaddedTile { x: self.conv_in.forward(&squashed)?.relu()?, ..latents };
        for ((blocks, smooth), [before, after]) in self.levels.iter().zip(self.level_reaches()) {
            tile = tile.cropped(before)?;
            tile.x = forward_all(blocks, tile.x)?;
            if let Some(smooth) = smooth {
                tile = tile.cropped(after)?.enlarged(|x| smooth.of_upsampled(x))?;
            }
        }
        tile.x = self.conv_out.forward(&tile.x)?;
        tile.cropped(0)?.x.affine(2.0, -1.0)
    }

    /// How many latent pixels around a part are read.
    fn reach(&self) -> usize {
        self.level_reaches().first().map_or(1, |[before, _]| before + 1)
    }

    /// How many pixels around a part are read from the beginning of each level on, and after its blocks.
    fn level_reaches(&self) -> Vec<[usize; 2]> {
        let mut reaches = Vec::new();
        let mut after = 1; // conv_out
        for (blocks, smooth) in self.levels.iter().rev() {
            if smooth.is_some() {
                // The convolution reads a pixel of the enlarged image.
                after = (after + 1usize).div_ceil(2);
            }
            let before = after + TinyBlock::REACH * blocks.len();
            reaches.push([before, after]);
            after = before;
        }
        reaches.reverse();
        reaches
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn config_errors_name_the_key() {
        for (config, expected) in [
            (json!({"act_fn": "silu"}), "act_fn"),
            (json!({"upsample_fn": "bilinear"}), "upsample_fn"),
            (json!({"upsampling_scaling_factor": 3}), "upsampling_scaling_factor"),
            (json!({"num_decoder_blocks": [3, 3]}), "decoder_block_out_channels"),
            (json!({"num_encoder_blocks": [1, 3], "encoder_block_out_channels": [64, 64]}), "num_decoder_blocks"),
            (json!({"scaling_factor": 0.0}), "scaling_factor"),
        ] {
            let error = TinyConfig::new(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    /// diffusers' defaults are those of TAESD.
    #[test]
    fn the_largest_activation_is_that_of_the_last_level() {
        let spec = TinyConfig::new(&json!({})).unwrap();
        assert_eq!((spec.latent_channels(), spec.downscale()), (4, 8));
        assert_eq!(spec.largest_activation(ImageSize { height: 1024, width: 512 }), 64 * 1024 * 512);
    }
}
