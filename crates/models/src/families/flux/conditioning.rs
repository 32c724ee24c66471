//! [`ConditioningEmbedder`]: timestep, guidance and pooled text to the vector that modulates every block.

use crate::scope::{Linear, Scope};
use crate::{DenoiserInput, ModelError, Result};
use candle_core::{D, DType, Tensor};

/// Channels of a sinusoidal embedding.
const SINUSOIDS: usize = 256;
/// The class takes times in 0..1 and embeds thousandths.
const TIME_SCALE: f64 = 1000.0;

/// Embeds timestep, guidance and pooled text, and adds them up.
pub(super) struct ConditioningEmbedder {
    time: Mlp,
    guidance: Option<Mlp>,
    pooled: Mlp,
}

/// Two linear layers around a SiLU.
struct Mlp {
    first: Linear,
    second: Linear,
}

impl ConditioningEmbedder {
    pub(super) fn load(scope: &Scope, with_guidance: bool) -> Result<Self> {
        let guidance = with_guidance.then(|| Mlp::load(&scope.at("guidance_embedder"))).transpose()?;
        let time = Mlp::load(&scope.at("timestep_embedder"))?;
        Ok(Self { time, guidance, pooled: Mlp::load(&scope.at("text_embedder"))? })
    }

    /// # Shapes
    /// timestep and guidance (batch), pooled (batch, channels) -> (batch, width).
    pub(super) fn forward(&self, input: &DenoiserInput) -> Result<Tensor> {
        let dtype = input.latents.dtype();
        let conditions = &input.conditions;
        let pooled = conditions.pooled.as_ref().ok_or_else(|| ModelError::missing_input("pooled_projections"))?;
        let mut sum = self.time.forward(&sinusoids(&input.timestep, dtype)?)?;
        match (&self.guidance, &conditions.guidance) {
            (Some(embedder), Some(scale)) => sum = (sum + embedder.forward(&sinusoids(scale, dtype)?)?)?,
            (Some(_), None) => return Err(ModelError::missing_input("guidance")),
            (None, Some(_)) => {
                let reason = "this model has no guidance embedding (guidance_embeds is false); leave it out";
                return Err(ModelError::bad_input("guidance", reason));
            }
            (None, None) => {}
        }
        Ok((sum + self.pooled.forward(&pooled.to_dtype(dtype)?)?)?)
    }
}

impl Mlp {
    fn load(scope: &Scope) -> Result<Self> {
        Ok(Self { first: scope.linear("linear_1")?, second: scope.linear("linear_2")? })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.second.forward(&self.first.forward(x)?.silu()?)
    }
}

/// Cosines, then sines, of the times at frequencies that fall geometrically from 1 to 1/10000 (DDPM; diffusers'
/// `get_timestep_embedding` with flip_sin_to_cos and no shift). Each step rounds to f32 as it does there: a time of
/// 3500 carries the rounding of a frequency 3500-fold into the angle.
///
/// # Shapes
/// times (batch) -> (batch, 256) in `dtype`.
fn sinusoids(times: &Tensor, dtype: DType) -> Result<Tensor> {
    let half = SINUSOIDS / 2;
    let slope = -(10000f64.ln() as f32);
    let frequencies: Vec<f32> = (0..half).map(|index| (slope * index as f32 / half as f32).exp()).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), times.device())?;
    let scaled = (times.to_dtype(dtype)? * TIME_SCALE)?.to_dtype(DType::F32)?;
    let angles = scaled.unsqueeze(1)?.broadcast_mul(&frequencies)?; // (batch, 128)
    Ok(Tensor::cat(&[angles.cos()?, angles.sin()?], D::Minus1)?.to_dtype(dtype)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn sinusoids_are_cosines_then_sines_of_thousandths() {
        let times = Tensor::new(&[0.5f32], &Device::Cpu).unwrap();
        let values = sinusoids(&times, DType::F32).unwrap().to_vec2::<f32>().unwrap().remove(0);
        for index in [0usize, 1, 64, 127] {
            let angle = 500.0 * (-(10000f64.ln()) * index as f64 / 128.0).exp();
            assert!((f64::from(values[index]) - angle.cos()).abs() < 5e-5, "cosine {index}");
            assert!((f64::from(values[128 + index]) - angle.sin()).abs() < 5e-5, "sine {index}");
        }
    }

    #[test]
    fn sinusoids_round_the_time_in_the_dtype_of_the_latents() {
        let times = Tensor::new(&[0.3f32], &Device::Cpu).unwrap();
        let rounded = Tensor::new(&[half::bf16::from_f32(0.3)], &Device::Cpu).unwrap();
        let values =
            |times| sinusoids(times, DType::BF16).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values(&times), values(&rounded));
    }
}
