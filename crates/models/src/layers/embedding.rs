//! [`sinusoids`] of times, [`Mlp`], [`FeedForward`] and [`modulation`]: what conditions a block and what follows its
//! attention.

use crate::Result;
use crate::weight_builder::{Linear, WeightBuilder};
use candle_core::{D, DType, Tensor};
use clearform_ops::gelu;

/// Channels of a sinusoidal embedding.
const SINUSOIDS: usize = 256;

/// Two linear layers around a SiLU.
pub(crate) struct Mlp {
    first: Linear,
    second: Linear,
}

/// Two linear layers around a GELU, as diffusers names them.
pub(crate) struct FeedForward {
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// Loads the layers `names` of `scope`: "linear_1" and "linear_2" in diffusers, "mlp.0" and "mlp.2" elsewhere.
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
        self.down.forward(&gelu(&self.up.forward(x)?)?)
    }
}

/// Shift, scale and gate, once or more, from the conditioning (adaLN-Zero; DiT, section 3.2).
///
/// # Shapes
/// conditioning (batch, width) -> N of (batch, width).
pub(crate) fn modulation<const N: usize>(linear: &Linear, conditioning: &Tensor) -> Result<[Tensor; N]> {
    let parts = linear.forward(&conditioning.silu()?)?.chunk(N, D::Minus1)?;
    parts.try_into().map_err(|_| candle_core::Error::Msg(format!("modulation is not {N} times as wide")).into())
}

/// Cosines, then sines, of `times` at frequencies that fall geometrically from 1 (DDPM; diffusers'
/// `get_timestep_embedding` with flip_sin_to_cos). With a `shift` of 0 the last stays above 1/10000, with 1 it reaches
/// it. Each step rounds to f32 as it does there: a time of 3500 carries the rounding of a frequency 3500-fold into the
/// angle.
///
/// # Shapes
/// times (batch) -> (batch, 256) in `dtype`.
pub(crate) fn sinusoids(times: &Tensor, shift: f64, dtype: DType) -> Result<Tensor> {
    let half = SINUSOIDS / 2;
    let (slope, steps) = (-(10000f64.ln() as f32), (half as f64 - shift) as f32);
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
    fn sinusoids_are_cosines_then_sines() {
        for (shift, steps) in [(0.0, 128.0), (1.0, 127.0)] {
            let times = Tensor::new(&[500f32], &Device::Cpu).unwrap();
            let values = sinusoids(&times, shift, DType::F32).unwrap().to_vec2::<f32>().unwrap().remove(0);
            for index in [0usize, 1, 64, 127] {
                let angle = 500.0 * (-(10000f64.ln()) * index as f64 / steps).exp();
                assert!((f64::from(values[index]) - angle.cos()).abs() < 5e-5, "cosine {index}");
                assert!((f64::from(values[128 + index]) - angle.sin()).abs() < 5e-5, "sine {index}");
            }
        }
    }
}
