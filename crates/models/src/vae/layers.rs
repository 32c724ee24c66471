//! Layers of the autoencoder: [`Resnet`], [`SpatialAttention`], and loading of convolutions and group norms.

use super::padded_tile::{NormMoments, PaddedTile};
use crate::Result;
use crate::layers::{Convolution, GroupNorm};
use crate::weight_builder::{Linear, WeightBuilder};
use candle_core::Tensor;
use candle_nn::{Conv2dConfig, Module};
use clearform_ops::reference::channel_affine;
use clearform_ops::wide_attention;

/// The epsilon of every norm in the autoencoder.
const NORM_EPS: f64 = 1e-6;
/// diffusers' `ResnetBlock2D` without a timestep embedding: two convolutions after group norm and SiLU, and a shortcut.
#[derive(Debug)]
pub(super) struct Resnet {
    norms: [GroupNorm; 2],
    convs: [Convolution; 2],
    shortcut: Option<Convolution>,
}

/// Single-head self-attention over all latent pixels: diffusers' `Attention` in `UNetMidBlock2D`.
#[derive(Debug)]
pub(super) struct SpatialAttention {
    norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

/// What the pixels of an image attend to.
#[derive(Debug)]
pub(super) struct AttentionContext {
    /// (batch or 1, pixels, channels).
    keys: Tensor,
    /// (batch or 1, pixels, channels).
    values: Tensor,
}

/// Loads a square convolution of shape [inputs, outputs, kernel].
pub(super) fn conv(
    builder: &WeightBuilder,
    [inputs, outputs, kernel]: [usize; 3],
    config: Conv2dConfig,
) -> Result<Convolution> {
    let weight = builder.shaped("weight", &[outputs, inputs, kernel, kernel])?;
    Ok(Convolution::new(weight, Some(builder.shaped("bias", &[outputs])?), config))
}

/// Loads a group norm.
pub(super) fn group_norm(builder: &WeightBuilder, channels: usize, groups: usize) -> Result<GroupNorm> {
    let weight = builder.shaped("weight", &[channels])?;
    let bias = builder.shaped("bias", &[channels])?;
    Ok(GroupNorm { weight, bias, groups, eps: NORM_EPS })
}

impl Resnet {
    pub(super) fn load(builder: &WeightBuilder, [inputs, outputs]: [usize; 2], groups: usize) -> Result<Self> {
        let same_size = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
        let shortcut = || conv(&builder.pp("conv_shortcut"), [inputs, outputs, 1], Conv2dConfig::default());
        Ok(Self {
            norms: [
                group_norm(&builder.pp("norm1"), inputs, groups)?,
                group_norm(&builder.pp("norm2"), outputs, groups)?,
            ],
            convs: [
                conv(&builder.pp("conv1"), [inputs, outputs, 3], same_size)?,
                conv(&builder.pp("conv2"), [outputs, outputs, 3], same_size)?,
            ],
            shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    /// # Shapes
    /// (batch, inputs, height, width) -> (batch, outputs, height, width).
    pub(super) fn forward(&self, tile: PaddedTile, moments: &mut dyn NormMoments) -> candle_core::Result<PaddedTile> {
        let [first, second] = &self.convs;
        let inner = first.of_activated(&tile.x, &moments.affine(&self.norms[0], &tile)?, None)?;
        let residual = match &self.shortcut {
            Some(shortcut) => shortcut.forward(&tile.x)?,
            None => tile.x,
        };
        let inner = PaddedTile { x: inner, margins: tile.margins };
        let x = second.of_activated(&inner.x, &moments.affine(&self.norms[1], &inner)?, Some(&residual))?;
        Ok(PaddedTile { x, ..inner })
    }
}

impl SpatialAttention {
    pub(super) fn load(builder: &WeightBuilder, channels: usize, groups: usize) -> Result<Self> {
        Ok(Self {
            norm: group_norm(&builder.pp("group_norm"), channels, groups)?,
            query: layer(builder, ["to_q", "query"])?,
            key: layer(builder, ["to_k", "key"])?,
            value: layer(builder, ["to_v", "value"])?,
            out: layer(builder, ["to_out.0", "proj_attn"])?,
        })
    }

    /// The normalised pixels.
    ///
    /// # Shapes
    /// (batch, channels, height, width) -> (batch, pixels, channels).
    pub(super) fn tokens(&self, tile: &PaddedTile, moments: &mut dyn NormMoments) -> candle_core::Result<Tensor> {
        let normal = channel_affine(&tile.x, &moments.affine(&self.norm, tile)?)?;
        normal.flatten_from(2)?.transpose(1, 2)?.contiguous()
    }

    /// What pixels attend to.
    ///
    /// # Shapes
    /// tokens (batch, pixels, channels).
    pub(super) fn context(&self, tokens: &Tensor) -> candle_core::Result<AttentionContext> {
        Ok(AttentionContext { keys: self.key.forward(tokens)?, values: self.value.forward(tokens)? })
    }

    /// `x` plus what its tokens attend to.
    ///
    /// # Shapes
    /// x (batch, channels, height, width) and its tokens -> as x.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        tokens: &Tensor,
        context: &AttentionContext,
    ) -> candle_core::Result<Tensor> {
        let (batch, pixels, channels) = tokens.dims3()?;
        let query = self.query.forward(tokens)?.reshape((context.keys.dim(0)?, (), channels))?;
        let attended = self.out.forward(&wide_attention(&query, &context.keys, &context.values)?)?;
        let attended = attended.reshape((batch, pixels, channels))?;
        x + attended.transpose(1, 2)?.reshape(x.dims())?
    }
}

/// Loads the linear layer under the first of `names` that exists. Older files have the second one,
/// and sometimes 1 x 1 convolutions.
fn layer(builder: &WeightBuilder, names: [&str; 2]) -> Result<Linear> {
    let older = !builder.pp(names[0]).has("weight") && builder.pp(names[1]).has("weight");
    Ok(builder.linear(names[usize::from(older)])?.flattened()?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vae::padded_tile::OwnMoments;
    use candle_core::{DType, Device};
    use clearform_weights::InMemoryTensors;

    /// With zero scores every pixel gets the mean of all.
    #[test]
    fn attention_without_preference_is_the_mean() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let eye = Tensor::eye(2, DType::F32, &Device::Cpu).unwrap();
        let ones = Tensor::ones(2, DType::F32, &Device::Cpu).unwrap();
        let linears = [("to_q", zeros(&[2, 2])), ("to_k", zeros(&[2, 2])), ("to_v", eye.clone()), ("to_out.0", eye)];
        let tensors = linears.into_iter().map(|(name, weight)| (format!("{name}.weight"), weight));
        let norm = [
            ("group_norm.weight".to_owned(), ones),
            ("group_norm.bias".to_owned(), Tensor::new(&[3f32, -1.], &Device::Cpu).unwrap()),
        ];
        let source: InMemoryTensors = tensors.chain(norm).collect();
        let attention = SpatialAttention::load(&WeightBuilder::root(&source), 2, 2).unwrap();
        let tile = PaddedTile::whole(clearform_ops::TorchGenerator::new(0).randn((1, 2, 40, 40)).unwrap());
        let tokens = attention.tokens(&tile, &mut OwnMoments).unwrap();
        let context = attention.context(&tokens).unwrap();
        let added = (attention.forward(&tile.x, &tokens, &context).unwrap() - &tile.x).unwrap();
        for (channel, mean) in [(0, 3f32), (1, -1.)] {
            let added = added.get(0).unwrap().get(channel).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(added.iter().all(|value| (value - mean).abs() < 1e-4));
        }
    }
}
