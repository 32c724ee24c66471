//! [`ControlledDenoiser`]: a transformer with ControlNets, whose residuals are added between its blocks.

use crate::{ControlNet, Controls, PluginError, Residual, Result};
use candle_core::{Tensor, TensorId};
use clearform_models::{Denoiser, DenoiserInput, HiddenState, ModelError, StepIndex};
use std::sync::{Arc, Mutex, PoisonError};

/// A ControlNet with its control.
#[derive(Debug, Clone)]
pub struct ControlNetInput {
    /// The ControlNet.
    pub controlnet: Arc<ControlNet>,
    /// The control, as [`ControlNet::input`] describes it.
    pub control: Tensor,
    /// Mode of each image, (batch, 1).
    pub mode: Option<Tensor>,
    /// Guidance scale, (batch), if the model embeds none.
    pub guidance: Option<Tensor>,
    /// Factor for the residuals (`controlnet_conditioning_scale` in diffusers).
    pub scale: f64,
    /// The range of the sampling process in which the ControlNet is active, within 0 to 1 (`control_guidance_start` and
    /// `control_guidance_end` in diffusers).
    pub interval: [f64; 2],
}

/// A transformer with ControlNets. The residuals of several ControlNets are added up block by block, so that nets of
/// different depths can be combined.
pub struct ControlledDenoiser<'a> {
    base: &'a dyn Denoiser,
    controls: Vec<ControlNetInput>,
    reuse: ResidualReuse,
    /// With [`ResidualReuse::WithinStep`].
    last_residuals: Mutex<Option<(EvaluationKey, Arc<Vec<Residual>>)>>,
}

/// Which residuals the second evaluation of classifier-free guidance gets, which has the latents of the first and
/// another prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ResidualReuse {
    /// Its own, of its own prompt: diffusers' StableDiffusion3ControlNetPipeline.
    #[default]
    Never,
    /// Those of the first: FluxControlNetPipeline, which controls the negative prompt so.
    WithinStep,
}

/// Identifies an evaluation: the tensors of its latents and timestep.
type EvaluationKey = [TensorId; 2];

impl<'a> ControlledDenoiser<'a> {
    /// `base` with `controls`. Without any it computes the same as `base`.
    pub fn new(base: &'a dyn Denoiser, controls: Vec<ControlNetInput>) -> Self {
        Self { base, controls, reuse: ResidualReuse::default(), last_residuals: Mutex::default() }
    }

    /// With other residuals for the second evaluation of a step.
    #[must_use]
    pub fn reusing(self, reuse: ResidualReuse) -> Self {
        Self { reuse, ..self }
    }

    fn residuals(&self, input: &DenoiserInput, state: &HiddenState) -> Result<Arc<Vec<Residual>>> {
        if self.reuse == ResidualReuse::Never {
            return Ok(Arc::new(self.compute_residuals(input, state)?));
        }
        let key: EvaluationKey = [input.latents.id(), input.timestep.id()];
        let mut last = self.last_residuals.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((known, residuals)) if *known == key => Ok(residuals.clone()),
            _ => {
                let residuals = Arc::new(self.compute_residuals(input, state)?);
                *last = Some((key, residuals.clone()));
                Ok(residuals)
            }
        }
    }

    /// `state` is that before the first block.
    fn compute_residuals(&self, input: &DenoiserInput, state: &HiddenState) -> Result<Vec<Residual>> {
        let block_count = self.base.block_count();
        let mut residuals = Vec::new();
        for control in self.controls.iter().filter(|control| control.is_active_at(input.step_index)) {
            residuals.extend(control.residuals(input, state)?);
        }
        match residuals.iter().flat_map(|residual| &residual.blocks).find(|block| **block >= block_count) {
            None => Ok(residuals),
            Some(block) => {
                let reason = format!("a residual is for block {block}, but the model has {block_count} blocks");
                Err(candle_core::Error::Msg(reason).into())
            }
        }
    }
}

/// Whether the whole step is within an interval, start and end as fractions of all steps, which is the rule of
/// diffusers.
pub fn is_within(StepIndex { index, steps }: StepIndex, [start, end]: [f64; 2]) -> bool {
    let progress = |index: usize| index as f64 / steps.max(1) as f64;
    progress(index) >= start && progress(index + 1) <= end
}

impl ControlNetInput {
    fn is_active_at(&self, step: StepIndex) -> bool {
        is_within(step, self.interval)
    }

    fn residuals(&self, input: &DenoiserInput, state: &HiddenState) -> Result<Vec<Residual>> {
        let Self { control, mode, guidance, .. } = self;
        let to_raster = || state.context.geometry.to_raster(&state.image);
        let embedded = self.controlnet.input().embedded_latents.then(to_raster).transpose()?;
        let controls =
            Controls { control, mode: mode.as_ref(), guidance: guidance.as_ref(), embedded: embedded.as_ref() };
        let scaled = |Residual { tensor, blocks }| -> Result<Residual> {
            let tensor = (tensor.to_device(input.latents.device())? * self.scale)?;
            Ok(Residual { tensor: tensor.to_dtype(input.latents.dtype())?, blocks })
        };
        self.controlnet.residuals(input, controls)?.into_iter().map(scaled).collect()
    }
}

impl Denoiser for ControlledDenoiser<'_> {
    fn layer_names(&self) -> &[String] {
        self.base.layer_names()
    }

    fn embed(&self, input: &DenoiserInput) -> clearform_models::Result<HiddenState> {
        self.base.embed(input)
    }

    fn block(&self, index: usize, state: HiddenState) -> clearform_models::Result<HiddenState> {
        self.base.block(index, state)
    }

    fn head(&self, state: &HiddenState) -> clearform_models::Result<Tensor> {
        self.base.head(state)
    }

    fn forward(&self, input: &DenoiserInput) -> clearform_models::Result<Tensor> {
        if self.controls.is_empty() {
            return self.base.forward(input);
        }
        let mut state = self.base.embed(input)?;
        let residuals = self.residuals(input, &state).map_err(model_error)?;
        let to_tiles = |residual: &Residual| state.context.geometry.to_tiles(&residual.tensor);
        let tiled = residuals.iter().map(to_tiles).collect::<candle_core::Result<Vec<_>>>()?;
        for index in 0..self.base.block_count() {
            state = self.base.block(index, state)?;
            let added = residuals.iter().zip(&tiled).filter(|(residual, _)| residual.blocks.contains(&index));
            for (_, tensor) in added {
                state.add_to_image(tensor)?;
            }
        }
        self.base.head(&state)
    }
}

fn model_error(error: PluginError) -> ModelError {
    match error {
        PluginError::Tensor(error) => ModelError::Tensor(error),
        other => ModelError::BadInput { name: "controlnet_cond".to_owned(), reason: other.to_string() },
    }
}
