//! [`Family`]: an architecture of diffusion transformer, and the list of those we have.

use crate::{Denoiser, DenoiserInput, Result};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

/// An architecture. Its weights have the names of its diffusers class.
pub trait Family: Send + Sync {
    /// Name as in the manifests ("flux").
    fn name(&self) -> &'static str;

    /// Builds the transformer from `config` (the diffusers config.json) and `source` (canonical names). Tensors are
    /// used in the number format the source gives; activations follow the latents.
    ///
    /// # Errors
    /// A bad config key, or a tensor that is missing.
    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>>;

    /// Reads the arguments of the diffusers class's `forward` from named tensors.
    ///
    /// # Errors
    /// A missing, misshapen or unknown tensor.
    fn input(&self, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput>;

    /// Names of the parameters that CLEAR distils in `layer`: image-stream to_q, to_k, to_v, to_out, weight and bias.
    fn distilled(&self, layer: &str) -> Vec<String>;

    /// VAE latents (batch, channels, height, width) to what the transformer takes, with the ids of its image tokens.
    ///
    /// # Errors
    /// Extents that the patch size does not divide.
    fn pack(&self, latents: &Tensor) -> Result<(Tensor, Option<Tensor>)>;

    /// The inverse of [`Self::pack`] for latents of `height` x `width`.
    ///
    /// # Errors
    /// A token count that is not that of the extents.
    fn unpack(&self, tokens: &Tensor, height: usize, width: usize) -> Result<Tensor>;
}

/// Every family, alphabetically.
pub const FAMILIES: &[&dyn Family] = &[&crate::families::flux::Flux];
