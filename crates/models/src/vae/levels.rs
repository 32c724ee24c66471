//! [`ResolutionLevel`] and [`MidBlock`]: the blocks that encoder and decoder are made of.

use super::VaeConfig;
use super::layers::{AttentionContext, Resnet, SpatialAttention, conv};
use super::padded_tile::{NormMoments, PaddedTile};
use crate::Result;
use crate::layers::Convolution;
use crate::weight_builder::WeightBuilder;
use candle_core::Tensor;
use candle_nn::Conv2dConfig;

/// diffusers' `DownEncoderBlock2D` or `UpDecoderBlock2D`: residual blocks, then the convolution of the downsampler or
/// upsampler, which all levels but the last have.
#[derive(Debug)]
pub(super) struct ResolutionLevel {
    pub resnets: Vec<Resnet>,
    pub resample: Option<Convolution>,
}

/// diffusers' `UNetMidBlock2D`.
#[derive(Debug)]
pub(super) struct MidBlock {
    channels: usize,
    first: Resnet,
    attention: Option<SpatialAttention>,
    second: Resnet,
}

/// Sizes of a [`ResolutionLevel`]: channels in and out, residual blocks, groups, and the name and kind of its
/// convolution.
pub(super) struct ResolutionLevelShape {
    pub channels: [usize; 2],
    pub blocks: usize,
    pub groups: usize,
    pub resample: Option<(&'static str, Conv2dConfig)>,
}

pub(super) const SAME_SIZE: Conv2dConfig =
    Conv2dConfig { padding: 1, stride: 1, dilation: 1, groups: 1, cudnn_fwd_algo: None };
pub(super) const HALVING: Conv2dConfig = Conv2dConfig { padding: 0, stride: 2, ..SAME_SIZE };

impl ResolutionLevel {
    /// Reads the weights of a level of `shape`.
    pub fn load(builder: &WeightBuilder, shape: &ResolutionLevelShape) -> Result<Self> {
        let [inputs, outputs] = shape.channels;
        let resnet = |index: usize| {
            let channels = [if index == 0 { inputs } else { outputs }, outputs];
            Resnet::load(&builder.pp(format!("resnets.{index}")), channels, shape.groups)
        };
        let resample = shape.resample.map(|(name, config)| conv(&builder.pp(name), [outputs, outputs, 3], config));
        Ok(Self { resnets: (0..shape.blocks).map(resnet).collect::<Result<_>>()?, resample: resample.transpose()? })
    }

    /// The residual blocks of the level, in their order.
    pub fn resnets(&self, tile: PaddedTile, moments: &mut dyn NormMoments) -> candle_core::Result<PaddedTile> {
        self.resnets.iter().try_fold(tile, |tile, resnet| resnet.forward(tile, moments))
    }
}

impl MidBlock {
    /// Reads the weights of a block of `channels`.
    pub fn load(builder: &WeightBuilder, channels: usize, config: &VaeConfig) -> Result<Self> {
        let attention = || SpatialAttention::load(&builder.pp("attentions.0"), channels, config.groups);
        Ok(Self {
            channels,
            first: Resnet::load(&builder.pp("resnets.0"), [channels; 2], config.groups)?,
            attention: config.attention.then(attention).transpose()?,
            second: Resnet::load(&builder.pp("resnets.1"), [channels; 2], config.groups)?,
        })
    }

    /// The first residual block, and its pixels as attention reads them.
    pub fn enter(
        &self,
        tile: PaddedTile,
        moments: &mut dyn NormMoments,
    ) -> candle_core::Result<(PaddedTile, Option<Tensor>)> {
        let tile = self.first.forward(tile, moments)?;
        let tokens = self.attention.as_ref().map(|attention| attention.tokens(&tile, moments)).transpose()?;
        Ok((tile, tokens))
    }

    /// Channels of its pixels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// What pixels attend to, of the tokens of an image; `None` without attention.
    pub fn context(&self, tokens: &Tensor) -> candle_core::Result<Option<AttentionContext>> {
        self.attention.as_ref().map(|attention| attention.context(tokens)).transpose()
    }

    /// Attention, and the second residual block.
    pub fn leave(
        &self,
        mut tile: PaddedTile,
        attended: Option<(&Tensor, &AttentionContext)>,
        moments: &mut dyn NormMoments,
    ) -> candle_core::Result<PaddedTile> {
        if let Some((attention, (tokens, context))) = self.attention.as_ref().zip(attended) {
            tile.x = attention.forward(&tile.x, tokens, context)?;
        }
        self.second.forward(tile, moments)
    }
}
