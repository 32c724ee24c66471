//! Layers of the autoencoder: [`Resnet`], [`SpatialAttention`], and loading of convolutions and group norms.

use crate::Result;
use crate::layers::{Convolution, GroupNorm};
use crate::weight_builder::{Linear, WeightBuilder};
use candle_core::{D, Tensor};
use candle_nn::{Conv2dConfig, Module};
use clearform_ops::silu;

/// The epsilon of every norm in the autoencoder.
const NORM_EPS: f64 = 1e-6;
/// Queries that attend at a time. The scores of a whole image would not fit in memory: at 128 x 128 latent pixels they
/// take 1 GB.
const QUERIES: usize = 1024;

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
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut inner = x.clone();
        for (norm, conv) in self.norms.iter().zip(&self.convs) {
            inner = conv.forward(&silu(&norm.forward(&inner)?)?)?;
        }
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)? + inner,
            None => x + inner,
        }
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

    /// # Shapes
    /// (batch, channels, height, width) -> the same.
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, channels, height, width) = x.dims4()?;
        let tokens = self.norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?.contiguous()?; // (batch, pixels, channels)
        let query = (self.query.forward(&tokens)? / (channels as f64).sqrt())?;
        let key = self.key.forward(&tokens)?.transpose(1, 2)?.contiguous()?; // (batch, channels, pixels)
        let value = self.value.forward(&tokens)?;
        let mut chunks = Vec::new();
        for start in (0..height * width).step_by(QUERIES) {
            let chunk = query.narrow(1, start, QUERIES.min(height * width - start))?.contiguous()?;
            chunks.push(candle_nn::ops::softmax(&chunk.matmul(&key)?, D::Minus1)?.matmul(&value)?);
        }
        let attended = self.out.forward(&Tensor::cat(&chunks, 1)?)?; // (batch, pixels, channels)
        x + attended.transpose(1, 2)?.reshape((batch, channels, height, width))?
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
    use candle_core::{DType, Device};
    use clearform_weights::InMemoryTensors;

    /// With zero scores every pixel gets the mean of all, whether in one chunk of queries or in two.
    #[test]
    fn chunked_attention_equals_attention() {
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
        let x = Tensor::randn(0f32, 1., (1, 2, 40, 40), &Device::Cpu).unwrap();
        let added = (attention.forward(&x).unwrap() - &x).unwrap();
        for (channel, mean) in [(0, 3f32), (1, -1.)] {
            let added = added.get(0).unwrap().get(channel).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(added.iter().all(|value| (value - mean).abs() < 1e-4));
        }
    }
}
