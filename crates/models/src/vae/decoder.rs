//! [`Decoder`]: latents to images.

use super::VaeConfig;
use super::layers::{AttentionContext, conv, group_norm};
use super::levels::{MidBlock, ResolutionLevel, ResolutionLevelShape, SAME_SIZE};
use super::padded_tile::{NormMoments, PaddedTile};
use super::tiles::{Entered, TiledNetwork};
use crate::Result;
use crate::layers::{Convolution, GroupNorm};
use crate::weight_builder::WeightBuilder;
use candle_nn::Module as _;

/// diffusers' `Decoder`.
#[derive(Debug)]
pub(super) struct Decoder {
    conv_in: Convolution,
    middle: MidBlock,
    levels: Vec<ResolutionLevel>,
    norm_out: GroupNorm,
    conv_out: Convolution,
}

impl Decoder {
    /// Reads the weights of the decoder that `config` describes.
    pub fn load(builder: &WeightBuilder, config: &VaeConfig) -> Result<Self> {
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

    /// How far around a pixel the decoder reads, attention apart.
    fn reaches(&self) -> Reaches {
        /// Convolutions of a residual block, each of which reads one pixel further.
        const RESNET: usize = 2;
        let mut levels = Vec::new();
        let mut after = 1; // conv_out
        for level in self.levels.iter().rev() {
            if level.resample.is_some() {
                // The convolution reads a pixel of the enlarged image.
                after = (after + 1usize).div_ceil(2);
            }
            let before = after + RESNET * level.resnets.len();
            levels.push(LevelReach { before, after });
            after = before;
        }
        levels.reverse();
        let attention = after + RESNET;
        Reaches { latents: attention + RESNET + 1, enter: RESNET + 1, levels }
    }
}

impl TiledNetwork for Decoder {
    fn input_scale(&self) -> usize {
        1
    }

    fn reach(&self) -> [usize; 2] {
        let Reaches { latents, enter, .. } = self.reaches();
        [latents, enter]
    }

    fn enter(&self, latents: PaddedTile, moments: &mut dyn NormMoments) -> candle_core::Result<Entered> {
        let tile = PaddedTile { x: self.conv_in.forward(&latents.x)?, ..latents };
        let (tile, tokens) = self.middle.enter(tile, moments)?;
        Ok(Entered { tile, tokens })
    }

    /// Margins are cropped as soon as nothing that remains reads them.
    fn leave(
        &self,
        entered: Entered,
        context: Option<&AttentionContext>,
        moments: &mut dyn NormMoments,
    ) -> candle_core::Result<PaddedTile> {
        let Entered { tile, tokens } = entered;
        let mut tile = self.middle.leave(tile, tokens.as_ref().zip(context), moments)?;
        for (level, reach) in self.levels.iter().zip(self.reaches().levels) {
            tile = level.resnets(tile.cropped(reach.before)?, moments)?;
            if let Some(smooth) = &level.resample {
                tile = tile.cropped(reach.after)?.enlarged(|x| smooth.of_upsampled(x))?;
            }
        }
        let x = self.conv_out.of_activated(&tile.x, &moments.affine(&self.norm_out, &tile)?, None)?;
        PaddedTile { x, ..tile }.cropped(0)
    }

    fn middle(&self) -> &MidBlock {
        &self.middle
    }
}

/// How many pixels around a part are read to compute it.
#[derive(Debug, PartialEq)]
struct Reaches {
    /// Latent pixels, by the whole decoder.
    latents: usize,
    /// Latent pixels, before the attention.
    enter: usize,
    levels: Vec<LevelReach>,
}

/// Pixels of a level that are read before and after its residual blocks.
#[derive(Debug, PartialEq)]
struct LevelReach {
    before: usize,
    after: usize,
}
