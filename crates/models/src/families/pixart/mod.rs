//! PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): self-attention, then cross-attention to the
//! text, with one modulation for all blocks.
//!
//! Follows diffusers' `PixArtTransformer2DModel`, `PixArtAlphaPipeline` and `PixArtSigmaPipeline`; the canonical tensor
//! names are those of the class.

pub(super) mod blocks;
mod config;
mod cross;
mod model;
mod size_bins;

pub use config::PixartConfig;
pub use model::PixartTransformer;

use self::size_bins::nearest_bin;
use crate::layers::ForwardArguments;
use crate::prompt::texts;
use crate::text::{CaptionCleaner, Padding, TextEncoders, TextRequest, TokenCount};
use crate::{
    Architecture, BatchSpec, Conditions, Denoiser, DenoiserInput, DistilledLayer, GuidanceKind, ImageSize,
    InputChannels, ModelFamily, NoiseProcess, PipelineSpec, Prompt, Result, StepIndex,
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

impl ModelFamily for Pixart {
    fn name(&self) -> &'static str {
        "pixart"
    }

    fn parse(&self, config: &Value) -> Result<Box<dyn Architecture>> {
        Ok(Box::new(PixartConfig::new(config)?))
    }
}

impl Architecture for PixartConfig {
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(PixartTransformer::build(self.clone(), source, plan)?))
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

    fn input_channels(&self) -> InputChannels {
        InputChannels { latents: self.in_channels, text: Some(self.text_channels), pooled: None }
    }

    fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self
    }
}

impl PipelineSpec for PixartConfig {
    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::Ddpm
    }

    fn guidance_kind(&self) -> GuidanceKind {
        GuidanceKind::ClassifierFree { unconditional: Prompt::Text(String::new()), channels: None }
    }

    fn patch_size(&self) -> usize {
        self.patch_size
    }

    fn sample_size(&self) -> Option<usize> {
        Some(self.sample_size)
    }

    fn generated_size(&self, size: ImageSize) -> ImageSize {
        nearest_bin(size, self.sample_size)
    }

    /// T5 with an attention mask, of the cleaned prompt: `encode_prompt` with `clean_caption` on, which is the default.
    fn encode(&self, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        let cleaner = CaptionCleaner::new()?;
        let prompts = texts(prompts)?.iter().map(|prompt| cleaner.clean(prompt)).collect::<Result<Vec<_>>>()?;
        let is_alpha = self.size_conditions;
        let request = TextRequest {
            component: "text_encoder",
            class: "T5EncoderModel",
            tokens: TokenCount::Exactly(if is_alpha { ALPHA_TEXT_TOKENS } else { TEXT_TOKENS }),
            padding: Padding::Masked,
        };
        let encoded = encoders.encode(&prompts, &request)?;
        Ok(Conditions { text: Some(encoded.hidden), text_mask: encoded.mask, ..Conditions::default() })
    }

    fn add_size_conditions(
        &self,
        conditions: Conditions,
        batch_spec: BatchSpec,
        device: &Device,
    ) -> Result<Conditions> {
        if !self.size_conditions {
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
            let config = PixartConfig::new(&config).unwrap();
            config.add_size_conditions(Conditions::default(), batch_spec, &Device::Cpu).unwrap()
        };
        let alpha = with_size(json!({"sample_size": 128}));
        assert_eq!(alpha.resolution.unwrap().to_vec2::<f32>().unwrap(), [[48.0, 64.0]; 2]);
        assert_eq!(alpha.aspect_ratio.unwrap().to_vec2::<f32>().unwrap(), [[0.75]; 2]);
        let sigma = with_size(json!({"sample_size": 128, "use_additional_conditions": false}));
        assert!(sigma.resolution.is_none() && sigma.aspect_ratio.is_none());
    }
}
