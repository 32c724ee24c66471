//! FLUX.1, by Black Forest Labs: double-stream blocks, then single-stream blocks, over packed latents.
//!
//! After diffusers' `FluxTransformer2DModel`, whose tensor names are canonical here. Read [`config`](FluxConfig), then
//! blocks, then [`model`](FluxTransformer); the rest are its inputs: conditioning, positions, latents. Beside it stands
//! [`controlnet`](FluxControlNet).

mod blocks;
mod conditioning;
mod config;
mod controlnet;
mod latents;
mod model;
mod positions;

pub use config::FluxConfig;
pub use controlnet::{FluxControlNet, FluxResiduals};
pub use model::FluxTransformer;

use crate::layers::ForwardArguments;
use crate::prompt::texts;
use crate::text::TextEncoders;
use crate::{
    BatchSpec, Conditions, Denoiser, DenoiserInput, DistilledLayer, Family, GuidanceKind, InputChannels, NoiseProcess,
    Prompt, Result, StepIndex,
};
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "flux".
#[derive(Debug, Clone, Copy)]
pub struct Flux;

/// FluxPipeline's `max_sequence_length`.
const MAX_TEXT_TOKENS: usize = 512;

impl Family for Flux {
    fn name(&self) -> &'static str {
        "flux"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(FluxTransformer::build(FluxConfig::new(config)?, source, plan)?))
    }

    fn input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        let mut arguments = ForwardArguments::new(tensors);
        let (latents, timestep) = (arguments.required("hidden_states")?, arguments.required("timestep")?);
        let conditions = Conditions {
            text: Some(arguments.required("encoder_hidden_states")?),
            pooled: Some(arguments.required("pooled_projections")?),
            image_ids: Some(arguments.required("img_ids")?),
            text_ids: Some(arguments.required("txt_ids")?),
            guidance: arguments.optional("guidance"),
            ..Conditions::default()
        };
        arguments.finish("flux", &INPUTS)?;
        Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
    }

    fn distilled(&self, layer: &str) -> Vec<DistilledLayer> {
        let projections = ["to_q", "to_k", "to_v", "to_out.0"];
        let count = if layer.starts_with("single_") { 3 } else { 4 };
        vec![DistilledLayer::new(layer, &projections[..count], &["weight", "bias"])]
    }

    fn channels(&self, config: &Value) -> Result<InputChannels> {
        let config = FluxConfig::new(config)?;
        let (text, pooled) = (Some(config.text_channels), Some(config.pooled_channels));
        Ok(InputChannels { latents: config.in_channels / (latents::PATCH * latents::PATCH), text, pooled })
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1.0 }
    }

    fn guidance_kind(&self, _: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::Embedded)
    }

    fn patch(&self, _: &Value) -> Result<usize> {
        Ok(latents::PATCH)
    }

    fn sample_size(&self, _: &Value) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Pooled CLIP and the sequence of T5, as FluxPipeline encodes them.
    fn encode(&self, _: &Value, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        let prompts = texts(prompts)?;
        let pooled = encoders.clip(1, &prompts)?.pooled;
        let tokens = encoders.tokenizer_length(2)?.unwrap_or(MAX_TEXT_TOKENS).min(MAX_TEXT_TOKENS);
        let text = encoders.t5(2, &prompts, tokens)?;
        let text_ids = Tensor::zeros((text.dim(1)?, 3), DType::F32, text.device())?;
        Ok(Conditions { text: Some(text), pooled: Some(pooled), text_ids: Some(text_ids), ..Conditions::default() })
    }

    fn add_size_conditions(
        &self,
        config: &Value,
        conditions: Conditions,
        batch_spec: BatchSpec,
        device: &Device,
    ) -> Result<Conditions> {
        let scale = || Tensor::new(vec![batch_spec.guidance as f32; batch_spec.batch], device);
        let guidance = FluxConfig::new(config)?.guidance.then(scale).transpose()?;
        Ok(Conditions { guidance, ..conditions })
    }

    fn pack(&self, latents: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let (tokens, ids) = latents::pack(latents)?;
        Ok((tokens, Some(ids)))
    }

    fn unpack(&self, tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        latents::unpack(tokens, height, width)
    }
}

const INPUTS: [&str; 7] =
    ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids"];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn an_unknown_or_missing_input_is_named() {
        let zero = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let mut tensors: BTreeMap<String, Tensor> = INPUTS.map(|name| (name.to_owned(), zero.clone())).into();
        assert!(Flux.input(tensors.clone()).unwrap().conditions.guidance.is_some());
        tensors.insert("img_idz".to_owned(), zero);
        assert!(Flux.input(tensors.clone()).unwrap_err().to_string().contains("\"img_idz\": is none of flux's inputs"));
        tensors.remove("img_idz");
        tensors.remove("timestep");
        assert!(Flux.input(tensors).unwrap_err().to_string().contains("\"timestep\""));
    }

    #[test]
    fn distilled_are_the_image_streams_projections() {
        let double = Flux.distilled("transformer_blocks.1.attn").remove(0).parameters;
        assert_eq!(double.len(), 8);
        assert_eq!(double[6], "transformer_blocks.1.attn.to_out.0.weight");
        let single = Flux.distilled("single_transformer_blocks.0.attn").remove(0);
        assert_eq!(single.name, "single_transformer_blocks.0.attn");
        assert_eq!(single.parameters.len(), 6);
        assert_eq!(single.parameters[5], "single_transformer_blocks.0.attn.to_v.bias");
    }
}
