//! FLUX.1 (Black Forest Labs): double-stream blocks, then single-stream blocks, over packed latents.
//!
//! Follows diffusers' `FluxTransformer2DModel`, `FluxControlNetModel` and `FluxPipeline`; the canonical tensor names
//! are those of the classes.

pub(super) mod blocks;
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

/// The family "flux": `FluxTransformer2DModel` in `FluxPipeline`.
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

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        let mut arguments = ForwardArguments::new(tensors);
        let latents = arguments.required("hidden_states")?;
        let timestep = arguments.required("timestep")?;
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

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        let projections = ["to_q", "to_k", "to_v", "to_out.0"];
        let count = if layer.starts_with("single_") { 3 } else { 4 };
        vec![DistilledLayer::new(layer, &projections[..count], &["weight", "bias"])]
    }

    fn input_channels(&self, config: &Value) -> Result<InputChannels> {
        let config = FluxConfig::new(config)?;
        let text = Some(config.text_channels);
        let pooled = Some(config.pooled_channels);
        Ok(InputChannels { latents: config.in_channels / (latents::PATCH_SIZE * latents::PATCH_SIZE), text, pooled })
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1.0 }
    }

    fn guidance_kind(&self, _: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::Embedded)
    }

    fn patch_size(&self, _: &Value) -> Result<usize> {
        Ok(latents::PATCH_SIZE)
    }

    fn sample_size(&self, _: &Value) -> Result<Option<usize>> {
        Ok(None)
    }

    /// `FluxPipeline.encode_prompt`: CLIP's pooled output, and T5's hidden states.
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
    fn inputs_are_taken_by_name() {
        let value = |index: usize| Tensor::new(&[index as f32], &Device::Cpu).unwrap();
        let tensors = INPUTS.iter().enumerate().map(|(index, name)| ((*name).to_owned(), value(index)));
        let input = Flux.parse_input(tensors.collect()).unwrap();
        let conditions = input.conditions;
        let optional =
            [conditions.text, conditions.pooled, conditions.guidance, conditions.image_ids, conditions.text_ids];
        let [text, pooled, guidance, image_ids, text_ids] = optional.map(Option::unwrap);
        let found = [input.latents, text, pooled, input.timestep, guidance, image_ids, text_ids];
        let values: Vec<f32> = found.iter().flat_map(|tensor| tensor.to_vec1::<f32>().unwrap()).collect();
        assert_eq!(values, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn an_unknown_or_missing_input_is_named() {
        let zero = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let mut tensors: BTreeMap<String, Tensor> = INPUTS.map(|name| (name.to_owned(), zero.clone())).into();
        tensors.insert("img_idz".to_owned(), zero);
        let error = Flux.parse_input(tensors.clone()).unwrap_err().to_string();
        assert!(error.contains("\"img_idz\": is not an input of flux"), "{error}");
        tensors.remove("img_idz");
        tensors.remove("timestep");
        let error = Flux.parse_input(tensors).unwrap_err().to_string();
        assert!(error.contains("\"timestep\": is missing"), "{error}");
    }

    #[test]
    fn the_image_streams_projections_are_distilled() {
        let layers = [
            ("transformer_blocks.1.attn", &["to_q", "to_k", "to_v", "to_out.0"][..]),
            ("single_transformer_blocks.0.attn", &["to_q", "to_k", "to_v"]),
        ];
        for (name, projections) in layers {
            let names =
                projections.iter().flat_map(|layer| [".weight", ".bias"].map(|end| format!("{name}.{layer}{end}")));
            let expected = DistilledLayer { name: name.to_owned(), parameters: names.collect() };
            assert_eq!(Flux.distilled_layers(name), [expected]);
        }
    }
}
