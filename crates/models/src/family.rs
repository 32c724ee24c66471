//! [`Family`]: what clearform needs to know about an architecture of diffusion transformer and its pipeline.

use crate::text::TextEncoders;
use crate::{BatchSpec, Conditions, Denoiser, DenoiserInput, GuidanceKind, NoiseProcess, Prompt, Result};
use candle_core::{Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// An architecture of diffusion transformer, with the pipeline it is used in.
///
/// `config` is always the config.json of the transformer's class, and tensors have that class's names.
pub trait Family: Send + Sync {
    /// Name as in the manifests ("flux").
    fn name(&self) -> &'static str;

    /// Builds the transformer from `source` (canonical names), with the attention that `plan` assigns to each layer.
    /// Weights keep the dtype of `source`; activations have the dtype of the latents.
    ///
    /// # Errors
    /// A bad config key, or a missing or misshapen tensor.
    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>>;

    /// Collects the arguments of the class's `forward`, given by name.
    ///
    /// # Errors
    /// A missing or unknown argument.
    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput>;

    /// The attention layers that CLEAR distils in the block whose attention is `layer`: that layer itself, and the
    /// second attention in families whose blocks may have one.
    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer>;

    /// Channels of the transformer's inputs.
    ///
    /// # Errors
    /// A bad config key.
    fn input_channels(&self, config: &Value) -> Result<InputChannels>;

    /// How training mixes latents with noise, and what the transformer predicts.
    fn noise_process(&self) -> NoiseProcess;

    /// How the pipeline spaces the sigmas of a flow before the scheduler shifts them.
    fn spacing(&self) -> StepSpacing {
        StepSpacing::Even
    }

    /// How the guidance scale acts.
    ///
    /// # Errors
    /// A bad config key.
    fn guidance_kind(&self, config: &Value) -> Result<GuidanceKind>;

    /// Width and height of a token in latent pixels (or image pixels, for a model without a VAE).
    ///
    /// # Errors
    /// A bad config key.
    fn patch_size(&self, config: &Value) -> Result<usize>;

    /// Width and height of the training images in latent pixels (or image pixels), if the config states it.
    ///
    /// # Errors
    /// A bad config key.
    fn sample_size(&self, config: &Value) -> Result<Option<usize>>;

    /// Tensors that files in the layout called `layout` contain although they are computed and not learned.
    ///
    /// # Errors
    /// A bad config key.
    fn computed_tensors(&self, config: &Value, layout: &str) -> Result<InMemoryTensors> {
        let _ = (config, layout);
        Ok(InMemoryTensors::default())
    }

    /// Encodes prompts with the text encoders of the pipeline, or turns classes into labels.
    ///
    /// # Shapes
    /// Every tensor has one row per prompt, except the ids of text tokens.
    ///
    /// # Errors
    /// A text for a class-conditional model or the reverse, or a text encoder that is not available.
    fn encode(&self, config: &Value, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions>;

    /// Adds to `conditions` what depends on the image size and the guidance scale, not on the prompt.
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

    /// Converts latents to the transformer's input, and computes the ids of the image tokens where the family has them
    /// (`FluxPipeline._pack_latents`).
    ///
    /// # Shapes
    /// (batch, channels, height, width) -> as [`DenoiserInput::latents`], and ids (image tokens, 3).
    ///
    /// # Errors
    /// A height or width that is not a multiple of the patch size.
    fn pack(&self, latents: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        Ok((latents.clone(), None))
    }

    /// The inverse of [`Self::pack`], for latents of `height` x `width`.
    ///
    /// # Shapes
    /// As [`DenoiserInput::latents`] -> (batch, channels, height, width).
    ///
    /// # Errors
    /// A number of tokens that does not match the size.
    fn unpack(&self, packed: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        crate::layers::expect("latents", packed, &[None, None, Some(height), Some(width)])?;
        Ok(packed.clone())
    }
}

/// How the sigmas of a flow are spaced before the scheduler shifts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StepSpacing {
    /// Evenly from 1 to 1 / steps: the `sigmas` that FluxPipeline passes to `set_timesteps`.
    #[default]
    Even,
    /// Evenly over the training timesteps: `set_timesteps(steps)`, as StableDiffusion3Pipeline calls it.
    Trained,
}

/// Channels of a transformer's inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputChannels {
    /// Channels of the latents, before they are packed.
    pub latents: usize,
    /// Channels of a text token; `None` for class-conditional models.
    pub text: Option<usize>,
    /// Channels of the pooled text.
    pub pooled: Option<usize>,
}

impl InputChannels {
    /// Inputs of a class-conditional model on latents of `latents` channels.
    pub(crate) fn of_class_model(latents: usize) -> Self {
        Self { latents, text: None, pooled: None }
    }
}

/// The parameters of one attention layer that CLEAR distils: to_q, to_k, to_v and to_out of the image stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DistilledLayer {
    /// Name of the attention layer.
    pub name: String,
    /// Names of the parameters.
    pub parameters: Vec<String>,
}

impl DistilledLayer {
    /// The parameters `suffixes` ("weight", "bias") of the linear layers `projections` in the attention layer `name`.
    pub(crate) fn new(name: &str, projections: &[&str], suffixes: &[&str]) -> Self {
        let parameters = projections
            .iter()
            .flat_map(|projection| suffixes.iter().map(move |suffix| format!("{name}.{projection}.{suffix}")));
        Self { name: name.to_owned(), parameters: parameters.collect() }
    }
}
