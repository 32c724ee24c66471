//! [`ModelFamily`] and [`Architecture`]: what clearform needs to know about a diffusion transformer. What its pipeline does
//! around it is in [`PipelineSpec`].

use crate::{Denoiser, DenoiserInput, PipelineSpec, Result};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// A family of diffusion transformers: the diffusers class that all of its models are instances of.
pub trait ModelFamily: Send + Sync {
    /// Name as in the manifests ("flux").
    fn name(&self) -> &'static str;

    /// Reads the config.json of a transformer of this family.
    ///
    /// # Errors
    /// A key of the wrong type, or sizes that contradict each other.
    fn parse(&self, config: &Value) -> Result<Box<dyn Architecture>>;
}

/// A diffusion transformer of given sizes, without weights. Tensors have the names of its diffusers class.
pub trait Architecture: Send + Sync {
    /// Builds the transformer from `source` (canonical names), with the attention that `plan` assigns to each layer.
    /// Weights keep the dtype of `source`; activations have the dtype of the latents.
    ///
    /// # Errors
    /// A missing or misshapen tensor.
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>>;

    /// Collects the arguments of the class's `forward`, given by name.
    ///
    /// # Errors
    /// A missing or unknown argument.
    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput>;

    /// The attention layers that CLEAR distils in the block whose attention is `layer`: that layer itself, and the
    /// second attention in families whose blocks may have one.
    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer>;

    /// Channels of the transformer's inputs.
    fn input_channels(&self) -> InputChannels;

    /// Tensors that files in the layout called `layout` contain although they are computed and not learned.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn computed_tensors(&self, layout: &str) -> Result<InMemoryTensors> {
        let _ = layout;
        Ok(InMemoryTensors::default())
    }

    /// The pipeline that runs the transformer.
    fn pipeline_spec(&self) -> &dyn PipelineSpec;
}

/// Channels of a transformer's inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputChannels {
    /// Channels of the latents before they are packed, with those of a control image where the transformer takes one.
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
