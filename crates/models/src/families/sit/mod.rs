//! SiT (Ma et al., arXiv 2401.08740): DiT's transformer, trained as a flow from noise at t = 0 to data at t = 1.
//!
//! diffusers has no class for it. Transformer and tensor names are those of [`dit`](super::dit), with the constants of
//! the original code in config.json. The transformer has output channels for a variance, which are not used.

use super::dit::{Dit, DitConfig, DitTransformer, unconditional};
use crate::layers::class_input;
use crate::text::TextEncoders;
use crate::{
    Conditions, Denoiser, DenoiserInput, DistilledLayer, Family, GuidanceKind, HiddenState, InputChannels,
    NoiseProcess, Prompt, Result,
};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "sit": `SiT` of the original code (willisma/SiT).
#[derive(Debug, Clone, Copy)]
pub struct Sit;

/// DiT's transformer, reduced to the first half of its output channels: the velocity.
struct SitTransformer {
    dit: DitTransformer,
    channels: usize,
}

/// `SiT.forward_with_cfg` guides only the first three channels.
const GUIDED_CHANNELS: usize = 3;

impl Family for Sit {
    fn name(&self) -> &'static str {
        "sit"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        let config = DitConfig::new(config)?;
        let channels = config.in_channels;
        Ok(Box::new(SitTransformer { dit: DitTransformer::build(config, source, plan)?, channels }))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        class_input("sit", tensors)
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        Dit.distilled_layers(layer)
    }

    fn input_channels(&self, config: &Value) -> Result<InputChannels> {
        Dit.input_channels(config)
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::ReversedFlow
    }

    fn guidance_kind(&self, config: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::ClassifierFree { unconditional: unconditional(config)?, channels: Some(GUIDED_CHANNELS) })
    }

    fn patch_size(&self, config: &Value) -> Result<usize> {
        Dit.patch_size(config)
    }

    fn sample_size(&self, config: &Value) -> Result<Option<usize>> {
        Dit.sample_size(config)
    }

    fn computed_tensors(&self, config: &Value, layout: &str) -> Result<InMemoryTensors> {
        Dit.computed_tensors(config, layout)
    }

    fn encode(&self, config: &Value, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        Dit.encode(config, prompts, encoders)
    }
}

impl Denoiser for SitTransformer {
    fn layer_names(&self) -> &[String] {
        self.dit.layer_names()
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        self.dit.embed(input)
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        self.dit.block(index, state)
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        Ok(self.dit.head(state)?.narrow(1, 0, self.channels)?)
    }
}
