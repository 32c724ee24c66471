//! PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): self-attention, then cross-attention to the
//! text, with one modulation for all blocks.
//!
//! Follows diffusers' `PixArtTransformer2DModel`, `PixArtAlphaPipeline` and `PixArtSigmaPipeline`; the canonical tensor
//! names are those of the class.

pub(super) mod blocks;
mod config;
mod cross;
mod model;

pub use config::PixartConfig;
pub use model::PixartTransformer;

use crate::layers::ForwardArguments;
use crate::prompt::texts;
use crate::text::TextEncoders;
use crate::{
    BatchSpec, Conditions, Denoiser, DenoiserInput, DistilledLayer, Family, GuidanceKind, ImageSize, InputChannels,
    NoiseProcess, Prompt, Result, StepIndex,
};
use candle_core::{Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "pixart": `PixArtTransformer2DModel` in `PixArtAlphaPipeline` or `PixArtSigmaPipeline`.
#[derive(Debug, Clone, Copy)]
pub struct Pixart;

/// `max_sequence_length` of PixArtSigmaPipeline, and of PixArtAlphaPipeline. Padding is masked, so the limit matters
/// only for prompts that exceed it.
const TEXT_TOKENS: usize = 300;
const ALPHA_TEXT_TOKENS: usize = 120;

impl Family for Pixart {
    fn name(&self) -> &'static str {
        "pixart"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(PixartTransformer::build(PixartConfig::new(config)?, source, plan)?))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        let mut arguments = ForwardArguments::new(tensors);
        let latents = arguments.required("hidden_states")?;
        let timestep = arguments.required("timestep")?;
        let conditions = Conditions {
            text: Some(arguments.required("encoder_hidden_states")?),
            text_mask: arguments.optional("encoder_attention_mask"),
            resolution: arguments.optional("resolution"),
            aspect_ratio: arguments.optional("aspect_ratio"),
            ..Conditions::default()
        };
        arguments.finish("pixart", &INPUTS)?;
        Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        vec![DistilledLayer::new(layer, &["to_q", "to_k", "to_v", "to_out.0"], &["weight", "bias"])]
    }

    fn input_channels(&self, config: &Value) -> Result<InputChannels> {
        let config = PixartConfig::new(config)?;
        Ok(InputChannels { latents: config.in_channels, text: Some(config.text_channels), pooled: None })
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::Ddpm
    }

    fn guidance_kind(&self, _: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::ClassifierFree { unconditional: Prompt::Text(String::new()), channels: None })
    }

    fn patch_size(&self, config: &Value) -> Result<usize> {
        Ok(PixartConfig::new(config)?.patch_size)
    }

    fn sample_size(&self, config: &Value) -> Result<Option<usize>> {
        Ok(Some(PixartConfig::new(config)?.sample_size))
    }

    /// T5 with an attention mask, of the prompt in lower case: `encode_prompt` with `clean_caption` off.
    fn encode(&self, config: &Value, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        let prompts: Vec<String> =
            texts(prompts)?.iter().map(|prompt| prompt.to_lowercase().trim().to_owned()).collect();
        let is_alpha = PixartConfig::new(config)?.size_conditions;
        let tokens = if is_alpha { ALPHA_TEXT_TOKENS } else { TEXT_TOKENS };
        let (text, mask) = encoders.t5_masked(1, &prompts, tokens)?;
        Ok(Conditions { text: Some(text), text_mask: Some(mask), ..Conditions::default() })
    }

    fn add_size_conditions(
        &self,
        config: &Value,
        conditions: Conditions,
        batch_spec: BatchSpec,
        device: &Device,
    ) -> Result<Conditions> {
        if !PixartConfig::new(config)?.size_conditions {
            return Ok(conditions);
        }
        let ImageSize { height, width } = batch_spec.size;
        let height = height as f32;
        let width = width as f32;
        let rows = |row: &[f32]| Tensor::new(row.repeat(batch_spec.batch), device)?.reshape((batch_spec.batch, ()));
        let resolution = rows(&[height, width])?;
        let ratio = rows(&[height / width])?;
        Ok(Conditions { resolution: Some(resolution), aspect_ratio: Some(ratio), ..conditions })
    }
}

const INPUTS: [&str; 6] =
    ["hidden_states", "encoder_hidden_states", "encoder_attention_mask", "timestep", "resolution", "aspect_ratio"];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn alpha_gets_resolution_and_aspect_ratio() {
        let batch_spec = BatchSpec { batch: 2, size: ImageSize { height: 48, width: 64 }, guidance: 4.5 };
        let with_size = |config: Value| {
            Pixart.add_size_conditions(&config, Conditions::default(), batch_spec, &Device::Cpu).unwrap()
        };
        let alpha = with_size(json!({"sample_size": 128}));
        assert_eq!(alpha.resolution.unwrap().to_vec2::<f32>().unwrap(), [[48.0, 64.0]; 2]);
        assert_eq!(alpha.aspect_ratio.unwrap().to_vec2::<f32>().unwrap(), [[0.75]; 2]);
        let sigma = with_size(json!({"sample_size": 128, "use_additional_conditions": false}));
        assert!(sigma.resolution.is_none() && sigma.aspect_ratio.is_none());
    }
}
