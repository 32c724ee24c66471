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
    Architecture, Conditions, Denoiser, DenoiserInput, DistilledLayer, GuidanceKind, InputChannels, ModelFamily,
    NoiseProcess, PipelineSpec, Prompt, Result,
};
use candle_core::{Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "dit": `DiTTransformer2DModel` in `DiTPipeline`.
#[derive(Debug, Clone, Copy)]
pub struct Dit;

impl ModelFamily for Dit {
    fn name(&self) -> &'static str {
        "dit"
    }

    fn parse(&self, config: &Value) -> Result<Box<dyn Architecture>> {
        Ok(Box::new(DitConfig::new(config)?))
    }
}

impl Architecture for DitConfig {
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(DitTransformer::build(self.clone(), source, plan)?))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        class_input("dit", tensors)
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        vec![DistilledLayer::new(layer, &["to_q", "to_k", "to_v", "to_out.0"], &["weight", "bias"])]
    }

    fn input_channels(&self) -> InputChannels {
        InputChannels::of_class_model(self.in_channels)
    }

    fn computed_tensors(&self, layout: &str) -> Result<InMemoryTensors> {
        if layout != ORIGINAL {
            return Ok(InMemoryTensors::default());
        }
        let side = self.sample_size / self.patch_size;
        let positions = self.positions((side, side), &Device::Cpu)?;
        Ok(InMemoryTensors::from_iter([("pos_embed".to_owned(), positions)]))
    }

    fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self
    }
}

impl PipelineSpec for DitConfig {
    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::Ddpm
    }

    fn guidance_kind(&self) -> GuidanceKind {
        GuidanceKind::ClassifierFree { unconditional: self.unconditional(), channels: None }
    }

    fn patch_size(&self) -> usize {
        self.patch_size
    }

    fn sample_size(&self) -> Option<usize> {
        Some(self.sample_size)
    }

    fn encode(&self, prompts: &[Prompt], _: &dyn TextEncoders) -> Result<Conditions> {
        let labels = classes(prompts, self.classes, &Device::Cpu)?;
        Ok(Conditions { classes: Some(labels), ..Conditions::default() })
    }
}

/// The layout of the original code, whose checkpoints contain the position embeddings of their image size.
const ORIGINAL: &str = "original";

impl DitConfig {
    /// The label that means no class.
    pub(super) fn unconditional(&self) -> Prompt {
        Prompt::Class(self.classes as u32)
    }
}
