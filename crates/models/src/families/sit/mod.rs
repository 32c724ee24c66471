//! SiT, by Ma et al. (arXiv 2401.08740): DiT's transformer, trained as a flow from noise at 0 to the picture at 1.
//!
//! There is no diffusers class of it; names and transformer are [`dit`](super::dit)'s, with the constants of the original
//! code in config.json. It learned to predict a variance that nobody uses: the velocity alone is its prediction.

use super::dit::{Dit, DitConfig, DitTransformer, no_class};
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

/// The family "sit".
#[derive(Debug, Clone, Copy)]
pub struct Sit;

/// SiT's transformer: DiT's, of whose output the velocity is kept.
struct SitTransformer {
    dit: DitTransformer,
    channels: usize,
}

/// Channels that the original code guides.
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

    fn input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        class_input("sit", tensors)
    }

    fn distilled(&self, layer: &str) -> Vec<DistilledLayer> {
        Dit.distilled(layer)
    }

    fn channels(&self, config: &Value) -> Result<InputChannels> {
        Dit.channels(config)
    }

    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::ReversedFlow
    }

    fn guidance_kind(&self, config: &Value) -> Result<GuidanceKind> {
        Ok(GuidanceKind::ClassifierFree { without: no_class(config)?, channels: Some(GUIDED_CHANNELS) })
    }

    fn patch(&self, config: &Value) -> Result<usize> {
        Dit.patch(config)
    }

    fn sample_size(&self, config: &Value) -> Result<Option<usize>> {
        Dit.sample_size(config)
    }

    fn computed(&self, config: &Value, layout: &str) -> Result<InMemoryTensors> {
        Dit.computed(config, layout)
    }

    fn encode(&self, config: &Value, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions> {
        Dit.encode(config, prompts, encoders)
    }
}

impl Denoiser for SitTransformer {
    fn layers(&self) -> &[String] {
        self.dit.layers()
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
