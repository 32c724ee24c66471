//! [`Family`]: an architecture of diffusion transformer, and the list of those we have.

use crate::text::TextEncoders;
use crate::{
    BatchSpec, Conditions, Denoiser, DenoiserInput, GuidanceKind, InputChannels, NoiseProcess, Prompt, Result,
};
use candle_core::{Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// An architecture. Its weights have the names of its class, and `config` is the class's config.json.
pub trait Family: Send + Sync {
    /// Name as in the manifests ("flux").
    fn name(&self) -> &'static str;

    /// Builds the transformer from `config` and `source` (canonical names). Tensors are used in the number format the
    /// source gives; activations follow the latents.
    ///
    /// # Errors
    /// A bad config key, or a tensor that is missing.
    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>>;

    /// Reads the arguments of the class's `forward` from named tensors.
    ///
    /// # Errors
    /// A missing, misshapen or unknown tensor.
    fn input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput>;

    /// What CLEAR distils in the block whose attention is `layer`: its own, and a second attention's where blocks of this
    /// family may have one.
    fn distilled(&self, layer: &str) -> Vec<DistilledLayer>;

    /// Channels of the tensors its transformer takes.
    ///
    /// # Errors
    /// A bad config key.
    fn channels(&self, config: &Value) -> Result<InputChannels>;

    /// How its samples are noised, and what it predicts of them.
    fn noise_process(&self) -> NoiseProcess;

    /// How its pipeline spaces the steps of a flow.
    fn spacing(&self) -> StepSpacing {
        StepSpacing::Even
    }

    /// How a guidance scale acts on it.
    ///
    /// # Errors
    /// A bad config key.
    fn guidance_kind(&self, config: &Value) -> Result<GuidanceKind>;

    /// Latent places (or pixels, where it draws pixels) along the edge of a token.
    ///
    /// # Errors
    /// A bad config key.
    fn patch(&self, config: &Value) -> Result<usize>;

    /// Latent places (or pixels) along the edge of the pictures it was trained on, where its config tells.
    ///
    /// # Errors
    /// A bad config key.
    fn sample_size(&self, config: &Value) -> Result<Option<usize>>;

    /// Tensors that files in the layout called `layout` hold though they are computed and not learned.
    ///
    /// # Errors
    /// A bad config key.
    fn computed(&self, config: &Value, layout: &str) -> Result<InMemoryTensors> {
        let _ = (config, layout);
        Ok(InMemoryTensors::default())
    }

    /// Encodes subjects, asking `encoders` for what it needs of them.
    ///
    /// # Shapes
    /// Every tensor has a row for each subject, but for ids of text tokens.
    ///
    /// # Errors
    /// A subject that this family does not draw, or an encoder that cannot be had.
    fn encode(&self, config: &Value, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions>;

    /// Adds to `conditions` what depends on the picture and not on its subject.
    ///
    /// # Errors
    /// A bad config key.
    fn add_size_conditions(
        &self,
        config: &Value,
        conditions: Conditions,
        batch_spec: BatchSpec,
        device: &Device,
    ) -> Result<Conditions> {
        let _ = (config, batch_spec, device);
        Ok(conditions)
    }

    /// Latents (batch, channels, height, width) to what the transformer takes, with the ids of its image tokens.
    ///
    /// # Errors
    /// Extents that the patch size does not divide.
    fn pack(&self, latents: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        Ok((latents.clone(), None))
    }

    /// The inverse of [`Self::pack`] for latents of `height` x `width`.
    ///
    /// # Errors
    /// A token count that is not that of the extents.
    fn unpack(&self, packed: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        crate::layers::expect("latents", packed, &[None, None, Some(height), Some(width)])?;
        Ok(packed.clone())
    }
}

/// Where the steps of a flow stand before they are shifted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StepSpacing {
    /// Evenly from 1 to 1 / steps, as FluxPipeline has it.
    #[default]
    Even,
    /// Evenly over the levels of training, as StableDiffusion3Pipeline leaves it to the scheduler.
    Trained,
}

/// Parameters that CLEAR distils: to_q, to_k, to_v and to_out of an attention layer's image stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DistilledLayer {
    /// Name of the attention layer.
    pub name: String,
    /// Names of the parameters.
    pub parameters: Vec<String>,
}

impl DistilledLayer {
    /// The layers `projections` of the attention layer `name`, with these `parts` each.
    pub(crate) fn new(name: &str, projections: &[&str], parts: &[&str]) -> Self {
        let pairs = projections.iter().flat_map(|projection| parts.iter().map(move |part| (projection, part)));
        let parameters = pairs.map(|(projection, part)| format!("{name}.{projection}.{part}"));
        Self { name: name.to_owned(), parameters: parameters.collect() }
    }
}

/// Every family, alphabetically.
pub const FAMILIES: &[&dyn Family] = &[
    &crate::families::dit::Dit,
    &crate::families::flux::Flux,
    &crate::families::minrf::Minrf,
    &crate::families::pixart::Pixart,
    &crate::families::sd3::Sd3,
    &crate::families::sit::Sit,
];
