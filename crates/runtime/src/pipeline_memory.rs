//! [`Pipeline::memory_plan`]: what the components of a pipeline take.

use crate::files::TRANSFORMER;
use crate::memory_plan::{EvaluationSize, PlannedComponent, Streaming};
use crate::weight_bytes::WeightBytes;
use crate::{Components, MemoryPlan, Pipeline, Residency, Result};
use candle_core::DType;
use clearform_models::ImageSize;
use clearform_models::text::TEXT_ENCODERS;

/// Bytes that a text encoder takes beside its weights, at most: T5-XXL's largest weight in f32, and the activations of a
/// few prompts. Smaller ones take as much as their weights.
const ENCODER_ACTIVATIONS: u64 = 400 << 20;

/// Values of a VAE's largest activation that are in memory at a time, in shares of it.
const VAE_ACTIVATIONS: u64 = 3;

/// Bytes that decoding in tiles takes, of which the samples that are measured first take most. Measured on FLUX's shape.
const TILE_BYTES: u64 = 3000 << 20;

const VAE: &str = "vae";

impl Pipeline {
    /// What generating `batch` images of `size` takes, and where the weights are meanwhile. On a GPU nothing is planned.
    ///
    /// # Errors
    /// A component cannot be read, or does not fit into memory in any way.
    pub fn memory_plan(&self, size: ImageSize, batch: usize) -> Result<MemoryPlan> {
        if !self.device().is_cpu() {
            return Ok(MemoryPlan { stages: Vec::new(), limit: None });
        }
        let names = self.transformer.identified().components();
        let encoders = names.iter().filter(|name| name.starts_with("text_encoder"));
        let mut components = encoders
            .map(|name| planned_encoder(&self.components, name, self.held.is_some()))
            .collect::<Result<Vec<_>>>()?;
        components.push(self.planned_transformer(size, batch)?);
        components.extend(self.planned_vae(size)?);
        MemoryPlan::fit(components, self.options.memory)
    }

    /// Where the blocks of the transformer are while it denoises `batch` images of `size`.
    pub(crate) fn transformer_residency(&self, size: ImageSize, batch: usize) -> Result<Residency> {
        if !self.device().is_cpu() {
            return Ok(Residency::InMemory);
        }
        let planned = self.planned_transformer(size, batch)?;
        Ok(MemoryPlan::fit(vec![planned], self.options.memory)?.residency(TRANSFORMER))
    }

    fn planned_transformer(&self, size: ImageSize, batch: usize) -> Result<PlannedComponent> {
        let identified = self.transformer.identified();
        let tokens = batch * (self.latent_spec.image_tokens(size)? + identified.variant.defaults.text_tokens);
        let width = identified.size("width").unwrap_or(0);
        let weights = self.transformer.weight_bytes(self.options.dtype);
        Ok(PlannedComponent::transformer(weights, EvaluationSize { tokens, width, dtype: self.dtype() }))
    }

    fn planned_vae(&self, size: ImageSize) -> Result<Option<PlannedComponent>> {
        let Some(vae) = self.latent_spec.vae() else { return Ok(None) };
        let whole = vae.largest_activation(size) as u64 * VAE_ACTIVATIONS * DType::F32.size_in_bytes() as u64;
        let is_tiled = self.options.vae_tiling.tile(vae, size).is_some();
        let activations = if is_tiled { whole.min(TILE_BYTES) } else { whole };
        Ok(Some(PlannedComponent {
            name: VAE.to_owned(),
            weights: WeightBytes::of(self.components.weights(VAE)?.as_ref(), Some(DType::F32)),
            activations,
            streaming: Streaming::Impossible,
        }))
    }
}

/// The text encoder `name` as the plan needs to know it. One that is released after its prompts needs each block once.
pub(crate) fn planned_encoder(components: &Components, name: &str, is_held: bool) -> Result<PlannedComponent> {
    let weights = WeightBytes::of(components.weights(name)?.as_ref(), None);
    let config = components.config(name)?;
    let stated = config["architectures"][0].as_str().or(config["_class_name"].as_str());
    let class = TEXT_ENCODERS.iter().find(|class| stated.is_some_and(|stated| class.names.contains(&stated)));
    let streaming = match class.is_some_and(|class| class.streams) {
        false => Streaming::Impossible,
        true if is_held => Streaming::Repeated,
        true => Streaming::Free,
    };
    Ok(PlannedComponent {
        name: name.to_owned(),
        weights,
        activations: weights.total.min(ENCODER_ACTIVATIONS),
        streaming,
    })
}
