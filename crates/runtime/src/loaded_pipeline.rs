//! [`LoadedPipeline`]: a pipeline whose weights stay in memory.

use crate::held_weights::HeldWeights;
use crate::{GenerateRequest, Pipeline, PipelineStage, Result};
use clearform_sampling::StepAction;
use image::RgbImage;

/// A pipeline that loads each component once and keeps it, for many images. It needs the memory of all components
/// together; [`Pipeline::generate`] needs that of the largest.
pub struct LoadedPipeline(Pipeline);

impl Pipeline {
    /// Loads transformer and VAE, and keeps them. Text encoders are loaded by the first image that needs them, and kept
    /// too.
    ///
    /// # Errors
    /// Weights cannot be read.
    pub fn load(mut self) -> Result<LoadedPipeline> {
        self.held = Some(HeldWeights::default());
        self.own_transformer(self.native_size(), 1)?;
        self.autoencoder()?;
        Ok(LoadedPipeline(self))
    }
}

impl LoadedPipeline {
    /// Generates images with the weights in memory; see [`Pipeline::generate`]. Several threads may call it.
    ///
    /// # Errors
    /// As [`Pipeline::generate`].
    pub fn generate(
        &self,
        request: &GenerateRequest,
        hook: &mut dyn FnMut(&PipelineStage) -> StepAction,
    ) -> Result<Vec<RgbImage>> {
        self.0.generate(request, hook)
    }

    /// The pipeline; its stages use the weights in memory.
    pub fn pipeline(&self) -> &Pipeline {
        &self.0
    }
}
