//! [`sinusoidal_embedding`] of timesteps, [`Mlp`], [`FeedForward`] and [`modulation`].

use crate::Result;
use crate::weight_builder::{Linear, WeightBuilder};
use candle_core::{D, DType, Tensor};
use clearform_ops::{by_tokens, gelu};

/// Channels of a sinusoidal embedding: 256 in every class here.
const EMBEDDING_CHANNELS: usize = 256;

/// Two linear layers with a SiLU between: diffusers' `TimestepEmbedding`, and `PixArtAlphaTextProjection` with "silu".
pub(crate) struct Mlp {
    first: Linear,
    second: Linear,
}

/// Two linear layers with a tanh-approximated GELU between: diffusers' `FeedForward` with "gelu-approximate".
pub(crate) struct FeedForward {
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// Loads two layers by name: "linear_1" and "linear_2" in diffusers, "0" and "2" in minRF.
    pub(crate) fn load(builder: &WeightBuilder, [first, second]: [&str; 2]) -> Result<Self> {
        Ok(Self { first: builder.linear(first)?, second: builder.linear(second)? })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.second.forward(&self.first.forward(x)?.silu()?)
    }
}

impl FeedForward {
    pub(crate) fn load(builder: &WeightBuilder) -> Result<Self> {
        Ok(Self { up: builder.linear("net.0.proj")?, down: builder.linear("net.2")? })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        by_tokens([x], self.down.inputs(), |[x]| self.down.forward(&gelu(&self.up.forward(x)?)?))
    }
}

/// `linear(silu(conditioning))` in N chunks: the shifts, scales and gates of adaLN-Zero (DiT, section 3.2; diffusers'
/// `AdaLayerNormZero`).
///
/// # Shapes
/// conditioning (batch, width) -> N of (batch, width).
pub(crate) fn modulation<const N: usize>(linear: &Linear, conditioning: &Tensor) -> Result<[Tensor; N]> {
    let parts = linear.forward(&conditioning.silu()?)?.chunk(N, D::Minus1)?;
    parts.try_into().map_err(|_| {
        candle_core::Error::Msg(format!("the modulation layer does not have {N} chunks of equal width")).into()
    })
}

/// diffusers' `get_timestep_embedding` with `flip_sin_to_cos` and `downscale_freq_shift` = `shift`: cosines, then
/// sines, of `times` · 10000^(-i / (128 - shift)). Each operation rounds to f32 as in diffusers: the angle of a time of
/// 3500 contains the rounding error of its frequency 3500-fold.
///
/// # Shapes
/// times (batch) -> (batch, 256) in `dtype`.
pub(crate) fn sinusoidal_embedding(times: &Tensor, shift: f64, dtype: DType) -> Result<Tensor> {
    let half = EMBEDDING_CHANNELS / 2;
    let slope = -(10000f64.ln() as f32);
    let steps = (half as f64 - shift) as f32;
    let frequencies: Vec<f32> = (0..half).map(|index| (slope * index as f32 / steps).exp()).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), times.device())?;
    let angles = times.to_dtype(DType::F32)?.unsqueeze(1)?.broadcast_mul(&frequencies)?; // (batch, 128)
    Ok(Tensor::cat(&[angles.cos()?, angles.sin()?], D::Minus1)?.to_dtype(dtype)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn embeddings_are_cosines_then_sines() {
        for (shift, steps) in [(0.0, 128.0), (1.0, 127.0)] {
            let times = Tensor::new(&[500f32], &Device::Cpu).unwrap();
            let values = sinusoidal_embedding(&times, shift, DType::F32).unwrap().to_vec2::<f32>().unwrap().remove(0);
            for index in [0usize, 1, 64, 127] {
                let angle = 500.0 * (-(10000f64.ln()) * index as f64 / steps).exp();
                assert!((f64::from(values[index]) - angle.cos()).abs() < 5e-5, "cosine {index}");
                assert!((f64::from(values[128 + index]) - angle.sin()).abs() < 5e-5, "sine {index}");
            }
        }
    }
}
