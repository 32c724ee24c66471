//! [`Scheduler`]: the scheduler that a pipeline's scheduler_config.json describes.

use crate::config::{bad, class, parse};
use crate::{Ddim, DpmSolver, FlowMatchEuler, Result, Schedule};
use clearform_models::{NoiseProcess, StepSpacing};
use serde_json::Value;

/// One of diffusers' schedulers.
#[derive(Debug, Clone, PartialEq)]
pub enum Scheduler {
    /// `FlowMatchEulerDiscreteScheduler`.
    FlowMatchEuler(FlowMatchEuler),
    /// `DDIMScheduler`.
    Ddim(Ddim),
    /// `DPMSolverMultistepScheduler`.
    DpmSolver(DpmSolver),
}

impl Scheduler {
    /// Reads the text of scheduler_config.json. The -Infinity that Python writes is accepted.
    ///
    /// # Errors
    /// As [`Self::from_config`], and for text that is not JSON.
    pub fn parse(text: &str) -> Result<Self> {
        Self::from_config(&parse(text)?)
    }

    /// Reads scheduler_config.json. `_class_name` selects the scheduler.
    ///
    /// # Errors
    /// [`SamplingError::BadScheduler`](crate::SamplingError::BadScheduler) for another class, or an option that is not
    /// supported.
    pub fn from_config(config: &Value) -> Result<Self> {
        match config.get("_class_name").and_then(Value::as_str) {
            Some(class::FLOW_MATCH) => Ok(Self::FlowMatchEuler(FlowMatchEuler::from_config(config)?)),
            Some(class::DDIM) => Ok(Self::Ddim(Ddim::from_config(config)?)),
            Some(class::DPM_SOLVER) => Ok(Self::DpmSolver(DpmSolver::from_config(config)?)),
            found => {
                let classes = [class::FLOW_MATCH, class::DDIM, class::DPM_SOLVER].join(", ");
                let found = found.map_or("none".to_owned(), |found| format!("{found:?}"));
                let reason =
                    format!("expected one of {classes}, found {found}; use a scheduler_config.json of one of these");
                Err(bad("_class_name", reason))
            }
        }
    }

    /// Sets how a flow's sigmas are spaced. Other schedulers have this in their config (`timestep_spacing`) and are
    /// unchanged.
    #[must_use]
    pub fn spaced(self, spacing: StepSpacing) -> Self {
        match self {
            Self::FlowMatchEuler(flow) => Self::FlowMatchEuler(flow.spaced(spacing)),
            other => other,
        }
    }

    /// The scheduler for models without a scheduler_config.json: a flow without shift, or [`Ddim::for_latents`].
    pub fn default_for(process: NoiseProcess) -> Self {
        match process {
            NoiseProcess::FlowMatching { .. } | NoiseProcess::ReversedFlow => {
                Self::FlowMatchEuler(FlowMatchEuler::default())
            }
            NoiseProcess::Ddpm => Self::Ddim(Ddim::for_latents()),
        }
    }

    /// `set_timesteps(steps)` for an image of `image_tokens` tokens, on which the shift of a flow may depend.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`](crate::SamplingError::BadSetting) for 0 steps, or more than the training
    /// timesteps.
    pub fn schedule(&self, steps: usize, image_tokens: usize) -> Result<Schedule> {
        match self {
            Self::FlowMatchEuler(flow) => flow.schedule(steps, image_tokens),
            Self::Ddim(ddim) => ddim.schedule(steps),
            Self::DpmSolver(solver) => solver.schedule(steps),
        }
    }
}

impl Default for Scheduler {
    fn default() -> Self {
        Self::FlowMatchEuler(FlowMatchEuler::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_class_name_selects_the_scheduler() {
        let named = |class: &str| Scheduler::from_config(&json!({"_class_name": class}));
        assert_eq!(named("FlowMatchEulerDiscreteScheduler").unwrap(), Scheduler::default());
        assert_eq!(named("DDIMScheduler").unwrap(), Scheduler::Ddim(Ddim::default()));
        assert_eq!(named("DPMSolverMultistepScheduler").unwrap(), Scheduler::DpmSolver(DpmSolver::default()));
        let other = named("PNDMScheduler").unwrap_err().to_string();
        let listed = "one of FlowMatchEulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler, found \"PNDM";
        assert!(other.contains(listed), "{other}");
        assert!(Scheduler::from_config(&json!({})).unwrap_err().to_string().contains("found none"));
    }

    #[test]
    fn minus_infinity_from_python_is_accepted() {
        let text =
            r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity, "flow_shift": 1.0}"#;
        assert_eq!(Scheduler::parse(text).unwrap(), Scheduler::DpmSolver(DpmSolver::default()));
        assert!(Scheduler::parse("<html>").unwrap_err().to_string().contains("expected JSON"));
    }
}
