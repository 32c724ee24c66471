//! [`TimeGuidanceTextEmbedder`]: timestep, guidance and pooled text to the vector that modulates every block.

use crate::layers::{Mlp, sinusoids};
use crate::weight_builder::WeightBuilder;
use crate::{DenoiserInput, ModelError, Result};
use candle_core::{DType, Tensor};

/// The class takes times in 0..1 and embeds thousandths.
const TIME_SCALE: f64 = 1000.0;

/// Embeds timestep, guidance and pooled text, and adds them up.
pub(super) struct TimeGuidanceTextEmbedder {
    time: Mlp,
    guidance: Option<Mlp>,
    pooled: Mlp,
}

impl TimeGuidanceTextEmbedder {
    pub(super) fn load(builder: &WeightBuilder, with_guidance: bool) -> Result<Self> {
        let load = |name: &str| Mlp::load(&builder.pp(name), ["linear_1", "linear_2"]);
        let guidance = with_guidance.then(|| load("guidance_embedder")).transpose()?;
        Ok(Self { time: load("timestep_embedder")?, guidance, pooled: load("text_embedder")? })
    }

    /// # Shapes
    /// timestep and guidance (batch), pooled (batch, channels) -> (batch, width).
    pub(super) fn forward(&self, input: &DenoiserInput) -> Result<Tensor> {
        let dtype = input.latents.dtype();
        let conditions = &input.conditions;
        let pooled = conditions.pooled.as_ref().ok_or_else(|| ModelError::missing_input("pooled_projections"))?;
        let mut sum = self.time.forward(&thousandths(&input.timestep, dtype)?)?;
        match (&self.guidance, &conditions.guidance) {
            (Some(embedder), Some(scale)) => sum = (sum + embedder.forward(&thousandths(scale, dtype)?)?)?,
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

/// Sinusoids of a thousand times `times`, which is rounded to `dtype` before.
///
/// # Shapes
/// times (batch) -> (batch, 256).
fn thousandths(times: &Tensor, dtype: DType) -> Result<Tensor> {
    sinusoids(&(times.to_dtype(dtype)? * TIME_SCALE)?, 0.0, dtype)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn times_are_rounded_in_the_dtype_of_the_latents() {
        let times = Tensor::new(&[0.3f32], &Device::Cpu).unwrap();
        let rounded = Tensor::new(&[half::bf16::from_f32(0.3)], &Device::Cpu).unwrap();
        let values =
            |times| thousandths(times, DType::BF16).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values(&times), values(&rounded));
        let exact = thousandths(&times, DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert!((exact[0][0] - 300f32.cos()).abs() < 5e-5);
    }
}
