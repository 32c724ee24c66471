//! [`ControlledDenoiser`]: a transformer with branches beside it, whose residuals are added between its blocks.

use crate::{ControlNet, Controls, PluginError, Residual, Result};
use candle_core::{Tensor, TensorId};
use clearform_models::{Denoiser, DenoiserInput, HiddenState, ModelError, StepIndex};
use std::sync::{Arc, Mutex, PoisonError};

/// A branch with what controls it.
#[derive(Debug, Clone)]
pub struct ControlNetInput {
    /// The branch.
    pub controlnet: Arc<ControlNet>,
    /// What it is controlled by, as it asks for it.
    pub control: Tensor,
    /// Mode of each picture, (batch, 1).
    pub mode: Option<Tensor>,
    /// Guidance scale, (batch), where the model embeds none.
    pub guidance: Option<Tensor>,
    /// Factor of its residuals (diffusers' controlnet_conditioning_scale).
    pub scale: f64,
    /// The part of the way on which it acts, within 0 to 1 (control_guidance_start and control_guidance_end).
    pub interval: [f64; 2],
}

/// A transformer with branches. Residuals are those of the branches one by one, added up: nets of any depth may act
/// together.
pub struct ControlledDenoiser<'a> {
    base: &'a dyn Denoiser,
    controls: Vec<ControlNetInput>,
    /// Of two evaluations of the same latents at the same time, as classifier-free guidance makes them, the second has
    /// the first's residuals, as in diffusers' pipelines.
    last: Mutex<Option<(EvaluationKey, Arc<Vec<Residual>>)>>,
}

/// Which latents at which time.
type EvaluationKey = [TensorId; 2];

impl<'a> ControlledDenoiser<'a> {
    /// `base` with `controls`; without any it computes the same as `base`.
    pub fn new(base: &'a dyn Denoiser, controls: Vec<ControlNetInput>) -> Self {
        Self { base, controls, last: Mutex::default() }
    }

    fn residuals(&self, input: &DenoiserInput) -> Result<Arc<Vec<Residual>>> {
        let evaluated: EvaluationKey = [input.latents.id(), input.timestep.id()];
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((known, residuals)) if *known == evaluated => Ok(residuals.clone()),
            _ => {
                let residuals = Arc::new(self.computed(input)?);
                *last = Some((evaluated, residuals.clone()));
                Ok(residuals)
            }
        }
    }

    fn computed(&self, input: &DenoiserInput) -> Result<Vec<Residual>> {
        let schedule = self.controls.iter().filter(|control| control.acts_at(input.step_index));
        let residuals = schedule.map(|control| control.residuals(input)).collect::<Result<Vec<_>>>()?;
        let residuals: Vec<Residual> = residuals.into_iter().flatten().collect();
        match residuals.iter().flat_map(|residual| &residual.blocks).find(|block| **block >= self.base.block_count()) {
            None => Ok(residuals),
            Some(block) => {
                let count = self.base.block_count();
                let reason = format!("a residual is for block {block}, but the model has {count}");
                Err(candle_core::Error::Msg(reason).into())
            }
        }
    }
}

impl ControlNetInput {
    /// diffusers' rule: the step must lie wholly within the interval.
    fn acts_at(&self, StepIndex { index, steps }: StepIndex) -> bool {
        let part = |index: usize| index as f64 / steps.max(1) as f64;
        part(index) >= self.interval[0] && part(index + 1) <= self.interval[1]
    }

    fn residuals(&self, input: &DenoiserInput) -> Result<Vec<Residual>> {
        let Self { control, mode, guidance, .. } = self;
        let controls = Controls { control, mode: mode.as_ref(), guidance: guidance.as_ref() };
        let scaled = |Residual { tensor, blocks }| -> Result<Residual> {
            let tensor = (tensor.to_device(input.latents.device())? * self.scale)?;
            Ok(Residual { tensor: tensor.to_dtype(input.latents.dtype())?, blocks })
        };
        self.controlnet.residuals(input, controls)?.into_iter().map(scaled).collect()
    }
}

impl Denoiser for ControlledDenoiser<'_> {
    fn layers(&self) -> &[String] {
        self.base.layers()
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
        let residuals = self.residuals(input).map_err(explain)?;
        let mut state = self.base.embed(input)?;
        let tiled = |residual: &Residual| state.context.geometry.to_tiles(&residual.tensor);
        let tiled = residuals.iter().map(tiled).collect::<candle_core::Result<Vec<_>>>()?;
        for index in 0..self.base.block_count() {
            state = self.base.block(index, state)?;
            let here = residuals.iter().zip(&tiled).filter(|(residual, _)| residual.blocks.contains(&index));
            for (_, tensor) in here {
                state.image = (&state.image + tensor)?;
            }
        }
        self.base.head(&state)
    }
}

fn explain(error: PluginError) -> ModelError {
    match error {
        PluginError::Tensor(error) => ModelError::Tensor(error),
        other => ModelError::BadInput { name: "controlnet_cond".to_owned(), reason: other.to_string() },
    }
}
