//! FLUX.1, by Black Forest Labs: double-stream blocks, then single-stream blocks, over packed latents.
//!
//! After diffusers' `FluxTransformer2DModel`, whose tensor names are canonical here. Read [`config`](FluxConfig), then
//! blocks, then [`model`](FluxTransformer); the rest are its inputs: conditioning, positions, latents. Beside it stands
//! [`controlnet`](FluxControlNet).

mod blocks;
mod conditioning;
mod config;
mod controlnet;
mod latents;
mod model;
mod positions;

pub use config::FluxConfig;
pub use controlnet::{FluxControlNet, FluxResiduals};
pub use model::FluxTransformer;

use crate::{Conditions, Denoiser, DenoiserInput, Family, ModelError, Moment, Result};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

/// The family "flux".
#[derive(Debug, Clone, Copy)]
pub struct Flux;

impl Family for Flux {
    fn name(&self) -> &'static str {
        "flux"
    }

    fn build(&self, config: &Value, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(FluxTransformer::build(FluxConfig::new(config)?, source, plan)?))
    }

    fn input(&self, mut tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        let mut required = |name: &str| tensors.remove(name).ok_or_else(|| ModelError::missing_input(name));
        let (latents, timestep) = (required("hidden_states")?, required("timestep")?);
        let conditions = Conditions {
            text: Some(required("encoder_hidden_states")?),
            pooled: Some(required("pooled_projections")?),
            image_ids: Some(required("img_ids")?),
            text_ids: Some(required("txt_ids")?),
            guidance: tensors.remove("guidance"),
            ..Conditions::default()
        };
        match tensors.into_keys().next() {
            Some(name) => Err(ModelError::bad_input(&name, format!("is none of flux's inputs: {}", INPUTS.join(", ")))),
            None => Ok(DenoiserInput { latents, timestep, moment: Moment::default(), conditions }),
        }
    }

    fn distilled(&self, layer: &str) -> Vec<String> {
        let output = if layer.starts_with("single_") { None } else { Some("to_out.0") };
        let projections = ["to_q", "to_k", "to_v"].into_iter().chain(output);
        projections.flat_map(|name| ["weight", "bias"].map(|part| format!("{layer}.{name}.{part}"))).collect()
    }

    fn pack(&self, latents: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let (tokens, ids) = latents::pack(latents)?;
        Ok((tokens, Some(ids)))
    }

    fn unpack(&self, tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        latents::unpack(tokens, height, width)
    }
}

const INPUTS: [&str; 7] =
    ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids"];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn an_unknown_or_missing_input_is_named() {
        let zero = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let mut tensors: BTreeMap<String, Tensor> = INPUTS.map(|name| (name.to_owned(), zero.clone())).into();
        assert!(Flux.input(tensors.clone()).unwrap().conditions.guidance.is_some());
        tensors.insert("img_idz".to_owned(), zero);
        assert!(Flux.input(tensors.clone()).unwrap_err().to_string().contains("\"img_idz\": is none of flux's inputs"));
        tensors.remove("img_idz");
        tensors.remove("timestep");
        assert!(Flux.input(tensors).unwrap_err().to_string().contains("\"timestep\""));
    }

    #[test]
    fn distilled_are_the_image_streams_projections() {
        let double = Flux.distilled("transformer_blocks.1.attn");
        assert_eq!(double.len(), 8);
        assert_eq!(double[6], "transformer_blocks.1.attn.to_out.0.weight");
        let single = Flux.distilled("single_transformer_blocks.0.attn");
        assert_eq!(single.len(), 6);
        assert_eq!(single[5], "single_transformer_blocks.0.attn.to_v.bias");
    }
}
