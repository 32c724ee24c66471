//! DiT (Peebles and Xie, arXiv 2212.09748): class-conditional, with self-attention only.
//!
//! Follows diffusers' `DiTTransformer2DModel` and `DiTPipeline`; the canonical tensor names are those of the class. The
//! original code differs in two constants, which are keys of [`DitConfig`].

pub(super) mod blocks;
mod config;
mod model;

pub use config::DitConfig;
pub use model::DitTransformer;

use crate::layers::class_input;
use crate::prompt::classes;
use crate::text::TextEncoders;
use crate::{
    Conditions, Denoiser, DenoiserInput, DistilledLayer, Family, GuidanceKind, InputChannels, NoiseProcess, Prompt,
    Result,
};
use candle_core::{Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "dit": `DiTTransformer2DModel` in `DiTPipeline`.
#[derive(Debug, Clone, Copy)]
pub struct Dit;

impl Family for Dit {
    fn name(&self) -> &'static str {
        "dit"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(DitTransformer::build(DitConfig::new(config)?, source, plan)?))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        class_input("dit", tensors)
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        vec![DistilledLayer::new(layer, &["to_q", "to_k", "to_v", "to_out.0"], &["weight", "bias"])]
    }

    fn input_channels(&self, config: &Value) -> Result<InputChannels> {
        Ok(InputChannels::of_class_model(DitConfig::new(config)?.in_channels))
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::Ddpm
    }

    fn guidance_kind(&self, config: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::ClassifierFree { unconditional: unconditional(config)?, channels: None })
    }

    fn patch_size(&self, config: &Value) -> Result<usize> {
        Ok(DitConfig::new(config)?.patch_size)
    }

    fn sample_size(&self, config: &Value) -> Result<Option<usize>> {
        Ok(Some(DitConfig::new(config)?.sample_size))
    }

    fn computed_tensors(&self, config: &Value, layout: &str) -> Result<InMemoryTensors> {
        if layout != ORIGINAL {
            return Ok(InMemoryTensors::default());
        }
        let config = DitConfig::new(config)?;
        let side = config.sample_size / config.patch_size;
        let positions = config.positions((side, side), &Device::Cpu)?;
        Ok(InMemoryTensors::from_iter([("pos_embed".to_owned(), positions)]))
    }

    fn encode(&self, config: &Value, prompts: &[Prompt], _: &dyn TextEncoders) -> Result<Conditions> {
        let labels = classes(prompts, DitConfig::new(config)?.classes, &Device::Cpu)?;
        Ok(Conditions { classes: Some(labels), ..Conditions::default() })
    }
}

/// The layout of the original code, whose checkpoints contain the position embeddings of their image size.
const ORIGINAL: &str = "original";

/// The label that means no class.
pub(super) fn unconditional(config: &Value) -> Result<Prompt> {
    Ok(Prompt::Class(DitConfig::new(config)?.classes as u32))
}
