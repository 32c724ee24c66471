//! [`Encoder`]: images to moments of latents.

use super::VaeConfig;
use super::layers::{AttentionContext, conv, group_norm};
use super::levels::{HALVING, MidBlock, ResolutionLevel, ResolutionLevelShape, SAME_SIZE};
use super::padded_tile::{NormMoments, PaddedTile};
use super::tiles::{Entered, TiledNetwork};
use crate::Result;
use crate::layers::{Convolution, GroupNorm};
use crate::weight_builder::WeightBuilder;
use candle_core::D;
use candle_nn::Module as _;

/// diffusers' `Encoder`.
#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: Convolution,
    levels: Vec<ResolutionLevel>,
    middle: MidBlock,
    norm_out: GroupNorm,
    conv_out: Convolution,
}

impl Encoder {
    /// Reads the weights of the encoder that `config` describes.
    pub fn load(builder: &WeightBuilder, config: &VaeConfig) -> Result<Self> {
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
}

/// images (batch, 3, height, width) -> (batch, 2 latent channels, height / downscale, width / downscale).
impl TiledNetwork for Encoder {
    fn input_scale(&self) -> usize {
        1 << (self.levels.len() - 1)
    }

    fn reach(&self) -> [usize; 2] {
        /// Convolutions of a residual block, each of which reads one pixel further.
        const RESNET: usize = 2;
        let mut pixels = 1; // conv_in
        for (index, level) in self.levels.iter().enumerate() {
            // A downsampler reads two pixels further.
            pixels += (RESNET * level.resnets.len() + 2 * usize::from(level.resample.is_some())) << index;
        }
        let enter = pixels.div_ceil(self.input_scale()) + RESNET;
        [enter + RESNET + 1, enter]
    }

    fn enter(&self, tile: PaddedTile, moments: &mut dyn NormMoments) -> candle_core::Result<Entered> {
        let mut tile = PaddedTile { x: self.conv_in.forward(&tile.x)?, ..tile };
        for level in &self.levels {
            tile = level.resnets(tile, moments)?;
            if let Some(halve) = &level.resample {
                // diffusers' `Downsample2D` pads only the right and bottom edges.
                tile = tile.halved(|x| {
                    halve.forward(&x.pad_with_zeros(D::Minus1, 0, 1)?.pad_with_zeros(D::Minus2, 0, 1)?)
                })?;
            }
        }
        let (tile, tokens) = self.middle.enter(tile, moments)?;
        Ok(Entered { tile, tokens })
    }

    fn leave(
        &self,
        entered: Entered,
        context: Option<&AttentionContext>,
        moments: &mut dyn NormMoments,
    ) -> candle_core::Result<PaddedTile> {
        let Entered { tile, tokens } = entered;
        let tile = self.middle.leave(tile, tokens.as_ref().zip(context), moments)?;
        let x = self.conv_out.of_activated(&tile.x, &moments.affine(&self.norm_out, &tile)?, None)?;
        PaddedTile { x, ..tile }.cropped(0)
    }

    fn middle(&self) -> &MidBlock {
        &self.middle
    }
}
