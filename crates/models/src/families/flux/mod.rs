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
use crate::text::{Padding, TextEncoders, TextRequest, TokenCount};
use crate::{
    Architecture, BatchSpec, Conditions, Denoiser, DenoiserInput, DistilledLayer, GuidanceKind, InputChannels,
    ModelError, ModelFamily, NoiseProcess, PipelineSpec, Prompt, Result, StepIndex,
};
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "flux": `FluxTransformer2DModel` in `FluxPipeline`.
#[derive(Debug, Clone, Copy)]
pub struct Flux;

const CLIP: TextRequest = TextRequest {
    component: "text_encoder",
    class: "CLIPTextModel",
    tokens: TokenCount::Maximum,
    padding: Padding::Attended,
};
const T5: TextRequest = TextRequest {
    component: "text_encoder_2",
    class: "T5EncoderModel",
    // FluxPipeline's `max_sequence_length`.
    tokens: TokenCount::AtMost(512),
    padding: Padding::Attended,
};

impl ModelFamily for Flux {
    fn name(&self) -> &'static str {
        "flux"
    }

    fn parse(&self, config: &Value) -> Result<Box<dyn Architecture>> {
        Ok(Box::new(FluxConfig::new(config)?))
    }
}

impl Architecture for FluxConfig {
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(FluxTransformer::build(self.clone(), source, plan)?))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        let mut arguments = ForwardArguments::new(tensors);
        let latents = arguments.required("hidden_states")?;
        let timestep = checked_timestep(arguments.required("timestep")?)?;
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

    fn input_channels(&self) -> InputChannels {
        let latents = self.in_channels / config::LATENTS_PER_TOKEN;
        InputChannels { latents, text: Some(self.text_channels), pooled: Some(self.pooled_channels) }
    }

    fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self
    }
}

impl PipelineSpec for FluxConfig {
    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1.0 }
    }

    fn guidance_kind(&self) -> GuidanceKind {
        GuidanceKind::Embedded
    }

    fn patch_size(&self) -> usize {
        latents::PATCH_SIZE
    }

    /// `FluxPipeline.encode_prompt`: CLIP's pooled output, and T5's hidden states.
    fn encode(&self, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        let prompts = texts(prompts)?;
        let pooled = encoders.encode(&prompts, &CLIP)?.pooled;
        let text = encoders.encode(&prompts, &T5)?.hidden;
        let text_ids = Tensor::zeros((text.dim(1)?, 3), DType::F32, text.device())?;
        Ok(Conditions { text: Some(text), pooled, text_ids: Some(text_ids), ..Conditions::default() })
    }

    fn add_size_conditions(
        &self,
        conditions: Conditions,
        batch_spec: BatchSpec,
        device: &Device,
    ) -> Result<Conditions> {
        let scale = || Tensor::new(vec![batch_spec.guidance as f32; batch_spec.batch], device);
        let guidance = self.guidance.then(scale).transpose()?;
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

/// FLUX's class takes the timestep as a share of 1000, unlike the classes of other families.
///
/// # Errors
/// A value is not between 0 and 1.
fn checked_timestep(timestep: Tensor) -> Result<Tensor> {
    let values = timestep.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    match values.into_iter().find(|value| !(0.0..=1.0).contains(value)) {
        Some(value) => {
            let reason = format!("expected values from 0 to 1 (divide by 1000), found {value}");
            Err(ModelError::bad_input("timestep", reason))
        }
        None => Ok(timestep),
    }
}

const INPUTS: [&str; 7] =
    ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids"];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use serde_json::json;

    /// The architecture of FLUX.1-schnell, whose sizes are the defaults.
    fn schnell() -> Box<dyn Architecture> {
        Flux.parse(&json!({})).unwrap()
    }

    #[test]
    fn inputs_are_taken_by_name() {
        let value = |index: usize| Tensor::new(&[index as f32 / 8.0], &Device::Cpu).unwrap();
        let tensors = INPUTS.iter().enumerate().map(|(index, name)| ((*name).to_owned(), value(index)));
        let input = schnell().parse_input(tensors.collect()).unwrap();
        let conditions = input.conditions;
        let optional =
            [conditions.text, conditions.pooled, conditions.guidance, conditions.image_ids, conditions.text_ids];
        let [text, pooled, guidance, image_ids, text_ids] = optional.map(Option::unwrap);
        let found = [input.latents, text, pooled, input.timestep, guidance, image_ids, text_ids];
        let values = found.map(|tensor| 8.0 * tensor.to_vec1::<f32>().unwrap()[0]);
        assert_eq!(values, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn a_timestep_out_of_range_is_refused() {
        for value in [-0.5f32, 1.5, 500.0, f32::NAN] {
            let value = Tensor::new(&[value], &Device::Cpu).unwrap();
            let error = schnell().parse_input(INPUTS.map(|name| (name.to_owned(), value.clone())).into()).unwrap_err();
            assert!(error.to_string().contains("from 0 to 1 (divide by 1000)"), "{error}");
        }
    }

    #[test]
    fn an_unknown_or_missing_input_is_named() {
        let zero = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let mut tensors: BTreeMap<String, Tensor> = INPUTS.map(|name| (name.to_owned(), zero.clone())).into();
        tensors.insert("img_idz".to_owned(), zero);
        let error = schnell().parse_input(tensors.clone()).unwrap_err().to_string();
        assert!(error.contains("\"img_idz\": is not an input of flux"), "{error}");
        tensors.remove("img_idz");
        tensors.remove("timestep");
        let error = schnell().parse_input(tensors).unwrap_err().to_string();
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
            assert_eq!(schnell().distilled_layers(name), [expected]);
        }
    }
}
