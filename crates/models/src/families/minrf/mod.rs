//! minRF (Simo Ryu, cloneofsimo/minRF): class-conditional rectified flow on pixels. Small community checkpoints, such
//! as those for MNIST and CIFAR-10, have this architecture.
//!
//! Follows its class `DiT_Llama`, whose tensor names are the canonical ones.

pub(super) mod blocks;
mod config;
mod model;

pub use config::MinrfConfig;
pub use model::MinrfTransformer;

use crate::layers::class_input;
use crate::prompt::classes;
use crate::text::TextEncoders;
use crate::{
    Architecture, Conditions, Denoiser, DenoiserInput, DistilledLayer, GuidanceKind, InputChannels, ModelFamily,
    NoiseProcess, PipelineSpec, Prompt, Result,
};
use candle_core::{Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "minrf": `DiT_Llama` of cloneofsimo/minRF.
#[derive(Debug, Clone, Copy)]
pub struct Minrf;

impl ModelFamily for Minrf {
    fn name(&self) -> &'static str {
        "minrf"
    }

    fn parse(&self, config: &Value) -> Result<Box<dyn Architecture>> {
        Ok(Box::new(MinrfConfig::new(config)?))
    }
}

impl Architecture for MinrfConfig {
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(MinrfTransformer::build(self.clone(), source, plan)?))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        class_input("minrf", tensors)
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        vec![DistilledLayer::new(layer, &["wq", "wk", "wv", "wo"], &["weight"])]
    }

    fn input_channels(&self) -> InputChannels {
        InputChannels::of_class_model(self.in_channels)
    }

    fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self
    }
}

impl PipelineSpec for MinrfConfig {
    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1.0 }
    }

    fn guidance_kind(&self) -> GuidanceKind {
        let unconditional = Prompt::Class(self.classes as u32);
        GuidanceKind::ClassifierFree { unconditional, channels: None }
    }

    fn patch_size(&self) -> usize {
        self.patch_size
    }

    fn sample_size(&self) -> Option<usize> {
        Some(self.input_size)
    }

    fn encode(&self, prompts: &[Prompt], _: &dyn TextEncoders) -> Result<Conditions> {
        let labels = classes(prompts, self.classes, &Device::Cpu)?;
        Ok(Conditions { classes: Some(labels), ..Conditions::default() })
    }
}
