//! Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): joint attention of image and text (MMDiT), with
//! sinusoidal position embeddings.
//!
//! Follows diffusers' `SD3Transformer2DModel` and `StableDiffusion3Pipeline`; canonical tensor names are the class's.

pub(super) mod blocks;
mod config;
mod model;

pub use config::Sd3Config;
pub use model::Sd3Transformer;

use crate::layers::ForwardArguments;
use crate::prompt::texts;
use crate::text::{ClipEncoded, TextEncoders};
use crate::{
    Conditions, Denoiser, DenoiserInput, DistilledLayer, Family, GuidanceKind, InputChannels, ModelError, NoiseProcess,
    Prompt, Result, StepIndex, StepSpacing,
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

impl Family for Sd3 {
    fn name(&self) -> &'static str {
        "sd3"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Sd3Transformer::build(Sd3Config::new(config)?, source, plan)?))
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

    fn input_channels(&self, config: &Value) -> Result<InputChannels> {
        let config = Sd3Config::new(config)?;
        let text = Some(config.text_channels);
        let pooled = Some(config.pooled_channels);
        Ok(InputChannels { latents: config.in_channels, text, pooled })
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1000.0 }
    }

    fn spacing(&self) -> StepSpacing {
        StepSpacing::Trained
    }

    fn guidance_kind(&self, _: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::ClassifierFree { unconditional: Prompt::Text(String::new()), channels: None })
    }

    fn patch_size(&self, config: &Value) -> Result<usize> {
        Ok(Sd3Config::new(config)?.patch_size)
    }

    fn sample_size(&self, config: &Value) -> Result<Option<usize>> {
        Ok(Some(Sd3Config::new(config)?.sample_size))
    }

    /// `StableDiffusion3Pipeline.encode_prompt`: the channels of both CLIPs concatenated and zero-padded to T5's,
    /// followed by T5's tokens. Without T5 these are zero.
    fn encode(&self, config: &Value, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        let prompts = texts(prompts)?;
        let channels = Sd3Config::new(config)?.text_channels;
        let first = encoders.clip(1, &prompts)?;
        let second = encoders.clip(2, &prompts)?;
        let clip = Tensor::cat(&[&first.penultimate, &second.penultimate], D::Minus1)?;
        let missing = channels.saturating_sub(clip.dim(D::Minus1)?);
        let clip = clip.pad_with_zeros(D::Minus1, 0, missing)?;
        let t5 = match encoders.has(3) {
            true => encoders.t5(3, &prompts, T5_TOKENS)?,
            false => Tensor::zeros((prompts.len(), T5_TOKENS, channels), DType::F32, clip.device())?,
        };
        let pooled = [projected(first, "text_encoder")?, projected(second, "text_encoder_2")?];
        Ok(Conditions {
            text: Some(Tensor::cat(&[&clip, &t5], 1)?),
            pooled: Some(Tensor::cat(&pooled, D::Minus1)?),
            ..Conditions::default()
        })
    }
}

/// The projected pooled output of the text encoder `component`.
fn projected(encoded: ClipEncoded, component: &str) -> Result<Tensor> {
    let reason = "has no text_projection; this family needs a CLIPTextModelWithProjection";
    encoded.projected.ok_or_else(|| ModelError::bad_input(component, reason))
}
