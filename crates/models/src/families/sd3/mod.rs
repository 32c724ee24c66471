//! Stable Diffusion 3 and 3.5, by Stability AI: joint blocks over image and text, with fixed positions.
//!
//! After diffusers' `SD3Transformer2DModel`, whose tensor names are canonical here. Read [`config`](Sd3Config), then
//! blocks, then [`model`](Sd3Transformer).

mod blocks;
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

/// The family "sd3".
#[derive(Debug, Clone, Copy)]
pub struct Sd3;

/// StableDiffusion3Pipeline's `max_sequence_length`.
const T5_TOKENS: usize = 256;

impl Family for Sd3 {
    fn name(&self) -> &'static str {
        "sd3"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Sd3Transformer::build(Sd3Config::new(config)?, source, plan)?))
    }

    fn input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        let mut arguments = ForwardArguments::new(tensors);
        let (latents, timestep) = (arguments.required("hidden_states")?, arguments.required("timestep")?);
        let conditions = Conditions {
            text: Some(arguments.required("encoder_hidden_states")?),
            pooled: Some(arguments.required("pooled_projections")?),
            ..Conditions::default()
        };
        arguments.finish("sd3", &["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"])?;
        Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
    }

    fn distilled(&self, layer: &str) -> Vec<DistilledLayer> {
        let one = |name: &str| DistilledLayer::new(name, &["to_q", "to_k", "to_v", "to_out.0"], &["weight", "bias"]);
        vec![one(layer), one(&format!("{layer}2"))]
    }

    fn channels(&self, config: &Value) -> Result<InputChannels> {
        let config = Sd3Config::new(config)?;
        let (text, pooled) = (Some(config.text_channels), Some(config.pooled_channels));
        Ok(InputChannels { latents: config.in_channels, text, pooled })
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1000.0 }
    }

    fn spacing(&self) -> StepSpacing {
        StepSpacing::Trained
    }

    fn guidance_kind(&self, _: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::ClassifierFree { without: Prompt::Text(String::new()), channels: None })
    }

    fn patch(&self, config: &Value) -> Result<usize> {
        Ok(Sd3Config::new(config)?.patch)
    }

    fn sample_size(&self, config: &Value) -> Result<Option<usize>> {
        Ok(Some(Sd3Config::new(config)?.sample_size))
    }

    /// Both CLIPs side by side, filled up to T5's channels, then T5's tokens, as StableDiffusion3Pipeline encodes them.
    /// Without T5 its tokens are zero.
    fn encode(&self, config: &Value, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        let (prompts, channels) = (texts(prompts)?, Sd3Config::new(config)?.text_channels);
        let (one, other) = (encoders.clip(1, &prompts)?, encoders.clip(2, &prompts)?);
        let clip = Tensor::cat(&[&one.penultimate, &other.penultimate], D::Minus1)?;
        let missing = channels.saturating_sub(clip.dim(D::Minus1)?);
        let clip = clip.pad_with_zeros(D::Minus1, 0, missing)?;
        let t5 = match encoders.has(3) {
            true => encoders.t5(3, &prompts, T5_TOKENS)?,
            false => Tensor::zeros((prompts.len(), T5_TOKENS, channels), DType::F32, clip.device())?,
        };
        let projected = |encoded: ClipEncoded, part: &str| {
            let reason = "has no text_projection, so it is another pipeline's; this family needs a CLIP that projects";
            encoded.projected.ok_or_else(|| ModelError::bad_input(part, reason))
        };
        let pooled = [projected(one, "text_encoder")?, projected(other, "text_encoder_2")?];
        Ok(Conditions {
            text: Some(Tensor::cat(&[&clip, &t5], 1)?),
            pooled: Some(Tensor::cat(&pooled, D::Minus1)?),
            ..Conditions::default()
        })
    }
}
