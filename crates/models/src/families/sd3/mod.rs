//! Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): joint attention of image and text (MMDiT), with
//! sinusoidal position embeddings.
//!
//! Follows diffusers' `SD3Transformer2DModel`, `SD3ControlNetModel` and `StableDiffusion3Pipeline`; the canonical tensor
//! names are those of the classes.

pub(super) mod blocks;
mod config;
mod controlnet;
mod embedders;
mod model;

pub use config::Sd3Config;
pub use controlnet::{Sd3ControlNet, Sd3ControlNetConfig};
pub use model::Sd3Transformer;

use crate::layers::ForwardArguments;
use crate::prompt::texts;
use crate::text::{EncodedText, Padding, TextEncoders, TextRequest, TokenCount};
use crate::{
    Architecture, Conditions, Denoiser, DenoiserInput, DistilledLayer, GuidanceKind, InputChannels, ModelError,
    ModelFamily, NoiseProcess, PipelineSpec, Prompt, Result, StepIndex, StepSpacing,
};
use candle_core::{D, DType, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "sd3": `SD3Transformer2DModel` in `StableDiffusion3Pipeline`.
#[derive(Debug, Clone, Copy)]
pub struct Sd3;

const PROJECTIONS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];
/// StableDiffusion3Pipeline's `max_sequence_length`.
const T5_TOKENS: usize = 256;
const CLIP_L: TextRequest = TextRequest {
    component: "text_encoder",
    class: "CLIPTextModelWithProjection",
    tokens: TokenCount::Maximum,
    padding: Padding::Attended,
};
const CLIP_G: TextRequest = TextRequest { component: "text_encoder_2", ..CLIP_L };
const T5: TextRequest = TextRequest {
    component: "text_encoder_3",
    class: "T5EncoderModel",
    tokens: TokenCount::Exactly(T5_TOKENS),
    padding: Padding::Attended,
};

impl ModelFamily for Sd3 {
    fn name(&self) -> &'static str {
        "sd3"
    }

    fn parse(&self, config: &Value) -> Result<Box<dyn Architecture>> {
        Ok(Box::new(Sd3Config::new(config)?))
    }
}

impl Architecture for Sd3Config {
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Sd3Transformer::build(self.clone(), source, plan)?))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        let mut arguments = ForwardArguments::new(tensors);
        let latents = arguments.required("hidden_states")?;
        let timestep = arguments.required("timestep")?;
        let conditions = Conditions {
            text: Some(arguments.required("encoder_hidden_states")?),
            pooled: Some(arguments.required("pooled_projections")?),
            ..Conditions::default()
        };
        arguments.finish("sd3", &["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"])?;
        Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        let second = format!("{layer}2");
        [layer, &second].map(|name| DistilledLayer::new(name, &PROJECTIONS, &["weight", "bias"])).into()
    }

    fn input_channels(&self) -> InputChannels {
        let text = Some(self.text_channels);
        InputChannels { latents: self.in_channels, text, pooled: Some(self.pooled_channels) }
    }

    fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self
    }
}

impl PipelineSpec for Sd3Config {
    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1000.0 }
    }

    fn spacing(&self) -> StepSpacing {
        StepSpacing::Trained
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

    /// `StableDiffusion3Pipeline.encode_prompt`: the channels of both CLIPs concatenated and zero-padded to T5's,
    /// followed by T5's tokens. Without T5 these are zero.
    fn encode(&self, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        let prompts = texts(prompts)?;
        let channels = self.text_channels;
        let first = ClipOutputs::of(encoders, &prompts, &CLIP_L)?;
        let second = ClipOutputs::of(encoders, &prompts, &CLIP_G)?;
        let clip = Tensor::cat(&[&first.penultimate, &second.penultimate], D::Minus1)?;
        let missing = channels.saturating_sub(clip.dim(D::Minus1)?);
        let clip = clip.pad_with_zeros(D::Minus1, 0, missing)?;
        let t5 = match encoders.has(T5.component) {
            true => encoders.encode(&prompts, &T5)?.hidden,
            false => Tensor::zeros((prompts.len(), T5_TOKENS, channels), DType::F32, clip.device())?,
        };
        let pooled = [first.projected, second.projected];
        Ok(Conditions {
            text: Some(Tensor::cat(&[&clip, &t5], 1)?),
            pooled: Some(Tensor::cat(&pooled, D::Minus1)?),
            ..Conditions::default()
        })
    }
}

/// What SD3 uses of a CLIP.
struct ClipOutputs {
    penultimate: Tensor,
    projected: Tensor,
}

impl ClipOutputs {
    fn of(encoders: &dyn TextEncoders, prompts: &[String], request: &TextRequest) -> Result<Self> {
        let EncodedText { penultimate, projected, .. } = encoders.encode(prompts, request)?;
        let reason = "has no text_projection; this family needs a CLIPTextModelWithProjection";
        match (penultimate, projected) {
            (Some(penultimate), Some(projected)) => Ok(Self { penultimate, projected }),
            _ => Err(ModelError::bad_input(request.component, reason)),
        }
    }
}
