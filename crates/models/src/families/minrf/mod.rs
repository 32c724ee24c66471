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
    Conditions, Denoiser, DenoiserInput, DistilledLayer, Family, GuidanceKind, InputChannels, NoiseProcess, Prompt,
    Result,
};
use candle_core::{Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "minrf": `DiT_Llama` of cloneofsimo/minRF.
#[derive(Debug, Clone, Copy)]
pub struct Minrf;

impl Family for Minrf {
    fn name(&self) -> &'static str {
        "minrf"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(MinrfTransformer::build(MinrfConfig::new(config)?, source, plan)?))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        class_input("minrf", tensors)
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        vec![DistilledLayer::new(layer, &["wq", "wk", "wv", "wo"], &["weight"])]
    }

    fn input_channels(&self, config: &Value) -> Result<InputChannels> {
        Ok(InputChannels::of_class_model(MinrfConfig::new(config)?.in_channels))
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1.0 }
    }

    fn guidance_kind(&self, config: &Value) -> Result<GuidanceKind> {
        let unconditional = Prompt::Class(MinrfConfig::new(config)?.classes as u32);
        Ok(GuidanceKind::ClassifierFree { unconditional, channels: None })
    }

    fn patch_size(&self, config: &Value) -> Result<usize> {
        Ok(MinrfConfig::new(config)?.patch_size)
    }

    fn sample_size(&self, config: &Value) -> Result<Option<usize>> {
        Ok(Some(MinrfConfig::new(config)?.input_size))
    }

    fn encode(&self, config: &Value, prompts: &[Prompt], _: &dyn TextEncoders) -> Result<Conditions> {
        let labels = classes(prompts, MinrfConfig::new(config)?.classes, &Device::Cpu)?;
        Ok(Conditions { classes: Some(labels), ..Conditions::default() })
    }
}
