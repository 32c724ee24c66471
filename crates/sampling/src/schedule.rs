//! [`Schedule`]: noise levels, timesteps and step coefficients of one image, whichever scheduler computed them.

use crate::config::class;
use crate::{Result, SamplingError};
use candle_core::{DType, Tensor};
use clearform_models::NoiseProcess;

/// A diffusers scheduler after `set_timesteps`: noise levels, timesteps, and the coefficients of each step.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    process: NoiseProcess,
    sigmas: Vec<f32>,
    /// Training timesteps, one per step.
    timesteps: Vec<f32>,
    steps: Vec<StepCoefficients>,
}

/// What a multistep solver keeps of previous steps. Start each image with the default value.
#[derive(Debug, Clone, Default)]
pub struct SolverState {
    /// The previous step's estimate of x0.
    data: Option<Tensor>,
}

/// One step: x' = latents · x + data · m + prediction · p + previous · m_before, for latents x, prediction p, and the
/// estimates m and m_before of x0 in this and the previous step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepCoefficients {
    /// How x0 is estimated, if the step needs it.
    pub estimate: Option<DataPrediction>,
    /// Weight of the latents.
    pub latents: f64,
    /// Weight of this step's estimate.
    pub data: f64,
    /// Weight of the prediction.
    pub prediction: f64,
    /// Weight of the previous step's estimate.
    pub previous: f64,
}

/// The estimate of x0: m = latents · x + prediction · p, clipped to -limit..limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DataPrediction {
    /// Weight of the latents.
    pub latents: f64,
    /// Weight of the prediction.
    pub prediction: f64,
    /// `clip_sample_range`, if x0 is clipped.
    pub limit: Option<f64>,
}

impl Schedule {
    /// `sigmas` has one more element than `timesteps` and `steps`.
    pub(crate) fn new(
        process: NoiseProcess,
        sigmas: Vec<f32>,
        timesteps: Vec<f32>,
        steps: Vec<StepCoefficients>,
    ) -> Result<Self> {
        if !steps.iter().all(StepCoefficients::is_finite) {
            let reason = format!(
                "steps: {} are too many for this scheduler: two have the same timestep; use fewer",
                steps.len()
            );
            return Err(SamplingError::BadSetting(reason));
        }
        Ok(Self { process, sigmas, timesteps, steps })
    }

    /// Adapts the schedule to a model of `process`: the range of its timesteps, and the sign of its velocity. By
    /// default a flow is that of FLUX.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`] for a flow's schedule and a DDPM model, or the reverse.
    pub fn for_process(self, process: NoiseProcess) -> Result<Self> {
        if self.process.is_flow() != process.is_flow() {
            let (model, needed) = match process {
                NoiseProcess::Ddpm => ("diffusion", format!("{} or {}", class::DDIM, class::DPM_SOLVER)),
                NoiseProcess::FlowMatching { .. } | NoiseProcess::ReversedFlow => {
                    ("flow", class::FLOW_MATCH.to_owned())
                }
            };
            let reason = format!(
                "scheduler: a {model} model needs {needed}, found one of the other kind; replace scheduler_config.json"
            );
            return Err(SamplingError::BadSetting(reason));
        }
        Ok(Self { process, ..self })
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// Noise levels, one more than steps. For a flow: the fraction of noise, from about 1 to 0. For DDPM: noise over
    /// signal, sqrt((1 - abar) / abar), down to 0 unless the scheduler's config ends higher.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The timestep of step `index` in the model's range, one per sample of `latents`.
    ///
    /// It is f32, except for a flow with a time scale of 1. There it has the dtype of the latents, and is sigma · 1000
    /// rounded to that dtype, divided by 1000, as in FluxPipeline.
    ///
    /// # Shapes
    /// latents (batch, ...) -> (batch).
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn timestep(&self, index: usize, latents: &Tensor) -> Result<Tensor> {
        let batch = |value: f32| Ok(Tensor::new(vec![value; latents.dim(0)?], latents.device())?);
        let sigma = self.sigmas[index];
        match self.process {
            NoiseProcess::FlowMatching { time_scale: 1.0 } => {
                let scaled = batch(self.timesteps[index])?.to_dtype(latents.dtype())?;
                let thousand = Tensor::new(1000.0_f32, latents.device())?.to_dtype(latents.dtype())?;
                Ok(scaled.broadcast_div(&thousand)?)
            }
            NoiseProcess::FlowMatching { time_scale } => batch(sigma * time_scale as f32),
            NoiseProcess::ReversedFlow => batch(1.0 - sigma),
            NoiseProcess::Ddpm => batch(self.timesteps[index]),
        }
    }

    /// `scheduler.step`: the latents after step `index`, computed in f32 and returned in the dtype of `latents`. For a
    /// flow this is Euler's step x + (sigma' - sigma) v. Call it in the order of the steps, with the same `history`.
    ///
    /// # Shapes
    /// latents and prediction (batch, ...) -> as latents.
    ///
    /// # Errors
    /// Shapes that differ, or a `history` without the previous step.
    pub fn step(
        &self,
        index: usize,
        latents: &Tensor,
        prediction: &Tensor,
        history: &mut SolverState,
    ) -> Result<Tensor> {
        let step = &self.steps[index];
        let x = latents.to_dtype(DType::F32)?;
        let p = prediction.to_dtype(DType::F32)?;
        let estimate = step.estimate.map(|estimate| estimate.evaluate(&x, &p)).transpose()?;
        let sign = if self.process == NoiseProcess::ReversedFlow { -1.0 } else { 1.0 };
        let terms = [
            (step.latents, Some(&x)),
            (step.data, estimate.as_ref()),
            (step.prediction * sign, Some(&p)),
            (step.previous, history.data.as_ref()),
        ];
        let moved = weighted_sum(&terms)?.to_dtype(latents.dtype())?;
        history.data = estimate;
        Ok(moved)
    }
}

impl StepCoefficients {
    /// Euler's step x + dt v.
    pub(crate) fn euler(dt: f32) -> Self {
        Self { estimate: None, latents: 1.0, data: 0.0, prediction: f64::from(dt), previous: 0.0 }
    }

    fn is_finite(&self) -> bool {
        let estimate = self.estimate.map_or([0.0; 2], |data| [data.latents, data.prediction]);
        let weights = [self.latents, self.data, self.prediction, self.previous];
        weights.iter().chain(&estimate).all(|weight| weight.is_finite())
    }
}

impl DataPrediction {
    fn evaluate(&self, latents: &Tensor, prediction: &Tensor) -> Result<Tensor> {
        let data = weighted_sum(&[(self.latents, Some(latents)), (self.prediction, Some(prediction))])?;
        Ok(match self.limit {
            Some(limit) => data.clamp(-limit, limit)?,
            None => data,
        })
    }
}

/// `numpy.linspace(first, last, points)`: first + i · step, with the last value exact.
pub(crate) fn linspace(first: f64, last: f64, points: usize) -> Vec<f64> {
    let step = (last - first) / (points.max(2) - 1) as f64;
    let value = |index| if index > 0 && index + 1 == points { last } else { index as f64 * step + first };
    (0..points).map(value).collect()
}

/// The sum of weight · tensor. A tensor may be missing if its weight is 0. A weight of 1 does not multiply.
fn weighted_sum(terms: &[(f64, Option<&Tensor>)]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (weight, tensor) in terms.iter().filter(|(weight, _)| *weight != 0.0) {
        let Some(tensor) = tensor else {
            return Err(SamplingError::BadSetting(
                "history: a multistep solver needs the previous step; start at step 0".to_owned(),
            ));
        };
        let term = if *weight == 1.0 { (*tensor).clone() } else { (*tensor * *weight)? };
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| SamplingError::BadSetting("a step in which all weights are 0".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Ddim, DpmSolver, FlowMatchEuler};
    use candle_core::Device;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn flow(process: NoiseProcess) -> Schedule {
        FlowMatchEuler::default().schedule(4, 0).unwrap().for_process(process).unwrap()
    }

    /// Sigmas 1, 0.75, 0.5, 0.25, 0; the model predicts 3 at latents 2.
    fn check(process: NoiseProcess, timestep: f32, after: f32) {
        let schedule = flow(process);
        let latents = tensor(&[2.0, 2.0]);
        assert_eq!(schedule.timestep(1, &latents).unwrap().to_vec1::<f32>().unwrap(), [timestep; 2], "{process:?}");
        let moved = schedule.step(1, &latents, &tensor(&[3.0, 3.0]), &mut SolverState::default()).unwrap();
        assert_eq!(moved.to_vec1::<f32>().unwrap(), [after; 2], "{process:?}");
    }

    #[test]
    fn timestep_range_and_sign_depend_on_the_process() {
        check(NoiseProcess::FlowMatching { time_scale: 1.0 }, 0.75, 1.25);
        check(NoiseProcess::FlowMatching { time_scale: 1000.0 }, 750.0, 1.25);
        check(NoiseProcess::ReversedFlow, 0.25, 2.75);
    }

    /// 333.3 is 334 in bf16; 334 / 1000 is then 0.33398438.
    #[test]
    fn only_flux_timesteps_are_rounded_to_the_dtype_of_the_latents() {
        let schedule = FlowMatchEuler::default().schedule(3, 0).unwrap();
        let latents = tensor(&[0.0]).to_dtype(DType::BF16).unwrap();
        let timestep = |process| schedule.clone().for_process(process).unwrap().timestep(2, &latents).unwrap();
        assert_eq!(
            timestep(NoiseProcess::FlowMatching { time_scale: 1000.0 }).to_vec1::<f32>().unwrap(),
            [1.0_f32 / 3.0 * 1000.0]
        );
        let rounded = timestep(NoiseProcess::FlowMatching { time_scale: 1.0 });
        assert_eq!(rounded.dtype(), DType::BF16);
        assert_eq!(rounded.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [0.333_984_38]);
    }

    #[test]
    fn a_scheduler_of_the_other_kind_is_refused() {
        let diffusion = Ddim::for_latents().schedule(4).unwrap();
        for (schedule, process, needed) in [
            (diffusion.clone(), NoiseProcess::ReversedFlow, "a flow model needs FlowMatchEulerDiscreteScheduler"),
            (
                diffusion,
                NoiseProcess::FlowMatching { time_scale: 1.0 },
                "a flow model needs FlowMatchEulerDiscreteScheduler",
            ),
            (
                flow(NoiseProcess::ReversedFlow),
                NoiseProcess::Ddpm,
                "a diffusion model needs DDIMScheduler or DPMSolverMultistepScheduler",
            ),
        ] {
            let error = schedule.for_process(process).unwrap_err().to_string();
            assert!(error.contains(needed), "{error}");
        }
    }

    #[test]
    fn a_step_without_its_history_is_refused() {
        let schedule = DpmSolver::default().schedule(4).unwrap();
        let latents = tensor(&[1.0]);
        let mut history = SolverState::default();
        assert!(schedule.step(1, &latents, &latents, &mut history).unwrap_err().to_string().contains("history"));
        schedule.step(0, &latents, &latents, &mut history).unwrap();
        schedule.step(1, &latents, &latents, &mut history).unwrap();
    }
}
