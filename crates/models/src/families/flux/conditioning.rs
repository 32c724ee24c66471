//! [`TimeGuidanceTextEmbedder`]: the embedding of timestep, guidance and pooled text that modulates every block.

use super::config::FluxConfig;
use crate::layers::{Mlp, sinusoidal_embedding};
use crate::weight_builder::WeightBuilder;
use crate::{DenoiserInput, ModelError, Result};
use candle_core::{DType, Tensor};

/// diffusers multiplies timestep and guidance by 1000 before embedding them.
const TIME_SCALE: f64 = 1000.0;

/// diffusers' `CombinedTimestepGuidanceTextProjEmbeddings`, or `CombinedTimestepTextProjEmbeddings` for models without
/// guidance: the sum of the embeddings.
pub(super) struct TimeGuidanceTextEmbedder {
    time: Mlp,
    guidance: Option<Mlp>,
    pooled: Mlp,
}

impl TimeGuidanceTextEmbedder {
    /// Loads the guidance embedder only if `config` has it.
    pub(super) fn load(builder: &WeightBuilder, config: &FluxConfig) -> Result<Self> {
        let load = |name: &str| Mlp::load(&builder.pp(name), ["linear_1", "linear_2"]);
        let guidance = config.guidance.then(|| load("guidance_embedder")).transpose()?;
        Ok(Self { time: load("timestep_embedder")?, guidance, pooled: load("text_embedder")? })
    }

    /// # Shapes
    /// timestep and guidance (batch), pooled (batch, channels) -> (batch, width).
    pub(super) fn forward(&self, input: &DenoiserInput) -> Result<Tensor> {
        let dtype = input.latents.dtype();
        let conditions = &input.conditions;
        let pooled = conditions.pooled.as_ref().ok_or_else(|| ModelError::missing_input("pooled_projections"))?;
        let mut sum = self.time.forward(&embed_scaled(&input.timestep, dtype)?)?;
        match (&self.guidance, &conditions.guidance) {
            (Some(embedder), Some(scale)) => sum = (sum + embedder.forward(&embed_scaled(scale, dtype)?)?)?,
            (Some(_), None) => return Err(ModelError::missing_input("guidance")),
            (None, Some(_)) => {
                let reason = "guidance_embeds is false in this model's config; omit this input";
                return Err(ModelError::bad_input("guidance", reason));
            }
            (None, None) => {}
        }
        Ok((sum + self.pooled.forward(&pooled.to_dtype(dtype)?)?)?)
    }
}

/// The sinusoidal embedding of 1000 `times`. As in diffusers, `times` is rounded to `dtype` first.
///
/// # Shapes
/// times (batch) -> (batch, 256).
fn embed_scaled(times: &Tensor, dtype: DType) -> Result<Tensor> {
    sinusoidal_embedding(&(times.to_dtype(dtype)? * TIME_SCALE)?, 0.0, dtype)
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
            |times| embed_scaled(times, DType::BF16).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values(&times), values(&rounded));
        let exact = embed_scaled(&times, DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert!((exact[0][0] - 300f32.cos()).abs() < 5e-5);
    }
}
