//! [`ImageBatch`]: images that are denoised together, and [`PreparedBatch`]: the same with everything but the transformer
//! computed. `generate`, `compare` and `transfer` all sample through it.

use crate::control::ControlImages;
use crate::control_concat::ControlConcat;
use crate::{EncodedPrompts, GuidanceScales, InitialLatents, Pipeline, Result};
use candle_core::Tensor;
use clearform_models::{BatchSpec, Denoiser, GuidanceKind};
use clearform_plugin_host::{ControlNetInput, ControlledDenoiser, ResidualReuse};
use clearform_sampling::{Guidance, Schedule, Start, StepAction, StepProgress, denoise};

/// Images that are denoised together.
#[derive(Debug, Clone)]
pub struct ImageBatch {
    /// Initial noise.
    pub latents: InitialLatents,
    /// Prompts; the batch is a multiple of their number.
    pub prompts: EncodedPrompts,
    /// Noise levels.
    pub schedule: Schedule,
    /// Guidance scales.
    pub scales: GuidanceScales,
    /// Control images.
    pub controls: ControlImages,
}

/// A batch that only the transformer is missing for.
pub struct PreparedBatch {
    start: Start,
    schedule: Schedule,
    guidance: Guidance,
    /// Latents of the transformer's own control image.
    control: Option<Tensor>,
    controlnets: Vec<ControlNetInput>,
    reuse: ResidualReuse,
}

impl Pipeline {
    /// Computes conditions and controls, with the VAE where a control is taken as latents.
    ///
    /// # Errors
    /// The number of prompts or control images does not divide the batch, or a control does not fit the model.
    pub fn prepare(&self, batch: ImageBatch) -> Result<PreparedBatch> {
        let ImageBatch { latents, prompts, schedule, scales, controls } = batch;
        let batch_spec = BatchSpec { size: latents.size, batch: latents.tensor.dim(0)?, guidance: scales.guidance };
        Ok(PreparedBatch {
            guidance: self.guidance(&prompts, &latents, scales)?,
            control: self.control_latents(&controls, batch_spec)?,
            controlnets: self.controlnet_inputs(&controls, batch_spec)?,
            reuse: match self.guidance_kind() {
                GuidanceKind::Embedded => ResidualReuse::WithinStep,
                GuidanceKind::ClassifierFree { .. } => ResidualReuse::Never,
            },
            start: Start::from_noise(latents.tensor),
            schedule,
        })
    }
}

impl PreparedBatch {
    /// The inputs of the ControlNets.
    pub fn controlnets(&self) -> &[ControlNetInput] {
        &self.controlnets
    }

    /// Denoises the batch with `transformer`, which the pipeline loaded. `hook` is called after each step.
    ///
    /// # Shapes
    /// The result is shaped as [`InitialLatents::tensor`].
    ///
    /// # Errors
    /// As [`denoise`].
    pub fn denoise(
        self,
        transformer: &dyn Denoiser,
        hook: &mut dyn FnMut(&StepProgress) -> StepAction,
    ) -> Result<Tensor> {
        let with_control = ControlConcat { base: transformer, control: self.control };
        let denoiser = ControlledDenoiser::new(&with_control, self.controlnets).reusing(self.reuse);
        Ok(denoise(&denoiser, self.start, &self.schedule, &self.guidance, hook)?)
    }
}
