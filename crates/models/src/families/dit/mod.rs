//! DiT, by Peebles and Xie (arXiv 2212.09748): class-conditional, self-attention alone.
//!
//! After diffusers' `DiTTransformer2DModel`, whose tensor names are canonical here; facebook's own code differs in two
//! constants, which are keys of [`config`](DitConfig). Read that, then blocks, then [`model`](DitTransformer).

mod blocks;
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

/// The family "dit".
#[derive(Debug, Clone, Copy)]
pub struct Dit;

impl Family for Dit {
    fn name(&self) -> &'static str {
        "dit"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(DitTransformer::build(DitConfig::new(config)?, source, plan)?))
    }

    fn input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        class_input("dit", tensors)
    }

    fn distilled(&self, layer: &str) -> Vec<DistilledLayer> {
        vec![DistilledLayer::new(layer, &["to_q", "to_k", "to_v", "to_out.0"], &["weight", "bias"])]
    }

    fn channels(&self, config: &Value) -> Result<InputChannels> {
        Ok(InputChannels::of_class_model(DitConfig::new(config)?.in_channels))
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::Ddpm
    }

    fn guidance_kind(&self, config: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::ClassifierFree { without: no_class(config)?, channels: None })
    }

    fn patch(&self, config: &Value) -> Result<usize> {
        Ok(DitConfig::new(config)?.patch)
    }

    fn sample_size(&self, config: &Value) -> Result<Option<usize>> {
        Ok(Some(DitConfig::new(config)?.sample_size))
    }

    fn computed(&self, config: &Value, layout: &str) -> Result<InMemoryTensors> {
        if layout != ORIGINAL {
            return Ok(InMemoryTensors::default());
        }
        let config = DitConfig::new(config)?;
        let side = config.sample_size / config.patch;
        let positions = config.positions((side, side), &Device::Cpu)?;
        Ok(InMemoryTensors::from_iter([("pos_embed".to_owned(), positions)]))
    }

    fn encode(&self, config: &Value, prompts: &[Prompt], _: &dyn TextEncoders) -> Result<Conditions> {
        let labels = classes(prompts, DitConfig::new(config)?.classes, &Device::Cpu)?;
        Ok(Conditions { classes: Some(labels), ..Conditions::default() })
    }
}

/// The layout of facebook's own code, which keeps the positions of its one picture size among the weights.
const ORIGINAL: &str = "original";

/// The label that stands for no class.
pub(super) fn no_class(config: &Value) -> Result<Prompt> {
    Ok(Prompt::Class(DitConfig::new(config)?.classes as u32))
}
