//! SiT (Ma et al., arXiv 2401.08740): DiT's transformer, trained as a flow from noise at t = 0 to data at t = 1.
//!
//! diffusers has no class for it. Transformer and tensor names are those of [`dit`](super::dit), with the constants of
//! the original code in config.json. The transformer has output channels for a variance, which are not used.

use super::dit::{DitConfig, DitTransformer};
use crate::layers::class_input;
use crate::text::TextEncoders;
use crate::{
    Architecture, Conditions, Denoiser, DenoiserInput, DistilledLayer, GuidanceKind, HiddenState, InputChannels,
    ModelFamily, NoiseProcess, PipelineSpec, Prompt, Result,
};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "sit": `SiT` of the original code (willisma/SiT).
#[derive(Debug, Clone, Copy)]
pub struct Sit;

/// Sizes of a SiT: those of a DiT.
struct SitConfig(DitConfig);

/// DiT's transformer, reduced to the first half of its output channels: the velocity.
struct SitTransformer {
    dit: DitTransformer,
    channels: usize,
}

/// `SiT.forward_with_cfg` guides only the first three channels.
const GUIDED_CHANNELS: usize = 3;

impl ModelFamily for Sit {
    fn name(&self) -> &'static str {
        "sit"
    }

    fn parse(&self, config: &Value) -> Result<Box<dyn Architecture>> {
        Ok(Box::new(SitConfig(DitConfig::new(config)?)))
    }
}

impl Architecture for SitConfig {
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        let dit = DitTransformer::build(self.0.clone(), source, plan)?;
        Ok(Box::new(SitTransformer { dit, channels: self.0.in_channels }))
    }

    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        class_input("sit", tensors)
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        self.0.distilled_layers(layer)
    }

    fn input_channels(&self) -> InputChannels {
        self.0.input_channels()
    }

    fn computed_tensors(&self, layout: &str) -> Result<InMemoryTensors> {
        self.0.computed_tensors(layout)
    }

    fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self
    }
}

impl PipelineSpec for SitConfig {
    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::ReversedFlow
    }

    fn guidance_kind(&self) -> GuidanceKind {
        GuidanceKind::ClassifierFree { unconditional: self.0.unconditional(), channels: Some(GUIDED_CHANNELS) }
    }

    fn patch_size(&self) -> usize {
        self.0.patch_size
    }

    fn sample_size(&self) -> Option<usize> {
        Some(self.0.sample_size)
    }

    fn encode(&self, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        self.0.encode(prompts, encoders)
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
