//! [`Schedule`]: the steps of one picture. It knows no model, and not which scheduler laid it out.

use crate::config::class;
use crate::{Result, SamplingError};
use candle_core::{DType, Tensor};
use clearform_models::NoiseProcess;

/// Noise levels, one per step and the last, and what each step does.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    process: NoiseProcess,
    sigmas: Vec<f32>,
    /// In units of the training's steps, one per step.
    timesteps: Vec<f32>,
    steps: Vec<StepCoefficients>,
}

/// What a step needs of those before it. A picture begins with the default one.
#[derive(Debug, Clone, Default)]
pub struct History {
    data: Option<Tensor>,
}

/// x' = latents x + data m + prediction p + previous m_before, where m estimates x0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepCoefficients {
    pub estimate: Option<DataPrediction>,
    pub latents: f64,
    pub data: f64,
    pub prediction: f64,
    pub previous: f64,
}

/// m = latents x + prediction p, held between -limit and limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DataPrediction {
    pub latents: f64,
    pub prediction: f64,
    pub limit: Option<f64>,
}

impl Schedule {
    /// One of `sigmas` more than of the others.
    pub(crate) fn new(
        process: NoiseProcess,
        sigmas: Vec<f32>,
        timesteps: Vec<f32>,
        steps: Vec<StepCoefficients>,
    ) -> Result<Self> {
        if !steps.iter().all(StepCoefficients::is_finite) {
            let reason = format!("steps: {} are too many, two of them stand on one timestep; use fewer", steps.len());
            return Err(SamplingError::BadSetting(reason));
        }
        Ok(Self { process, sigmas, timesteps, steps })
    }

    /// The same steps for a model of `process`, which says the unit of its times and what it predicts. Without it, a
    /// flow is FLUX's.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`] for a flow's steps and a diffusion model, or the reverse.
    pub fn for_process(self, process: NoiseProcess) -> Result<Self> {
        if self.process.is_flow() != process.is_flow() {
            let (model, needed) = match process {
                NoiseProcess::Ddpm => ("diffusion", format!("{} or {}", class::DDIM, class::DPM_SOLVER)),
                NoiseProcess::FlowMatching { .. } | NoiseProcess::ReversedFlow => {
                    ("flow", class::FLOW_MATCH.to_owned())
                }
            };
            let reason = format!("scheduler: a {model} model needs {needed}, found another; use one of its own kind");
            return Err(SamplingError::BadSetting(reason));
        }
        Ok(Self { process, ..self })
    }

    /// How many steps there are.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// The noise levels, one more than steps. Of a flow: the noise's share, the first 1 (or near it), the last 0. Of a
    /// diffusion: noise over signal, sqrt(1 - abar) / sqrt(abar), the last 0 unless the scheduler ends above.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The timestep of step `index` as the model takes it, one per sample of `latents`. Where a flow's scale is 1, as
    /// FluxPipeline hands it over, in the latents' format: sigma * 1000, rounded to it, / 1000. Else in f32.
    ///
    /// # Shapes
    /// latents (batch, ...) to (batch).
    ///
    /// # Errors
    /// The tensor library refused.
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

    /// Step `index` by what the model predicted, computed in f32, in the latents' format. A flow's is Euler's:
    /// x + (sigma' - sigma) v. Steps go in their order, with one `history`.
    ///
    /// # Shapes
    /// latents and prediction alike; so is the result.
    ///
    /// # Errors
    /// Shapes that differ; a history that lacks the step before.
    pub fn step(&self, index: usize, latents: &Tensor, prediction: &Tensor, history: &mut History) -> Result<Tensor> {
        let step = &self.steps[index];
        let (x, p) = (latents.to_dtype(DType::F32)?, prediction.to_dtype(DType::F32)?);
        let estimate = step.estimate.map(|data| data.of(&x, &p)).transpose()?;
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
    /// Euler's: x + change v.
    pub(crate) fn euler(change: f32) -> Self {
        Self { estimate: None, latents: 1.0, data: 0.0, prediction: f64::from(change), previous: 0.0 }
    }

    fn is_finite(&self) -> bool {
        let estimate = self.estimate.map_or([0.0; 2], |data| [data.latents, data.prediction]);
        let weights = [self.latents, self.data, self.prediction, self.previous];
        weights.iter().chain(&estimate).all(|weight| weight.is_finite())
    }
}

impl DataPrediction {
    fn of(&self, latents: &Tensor, prediction: &Tensor) -> Result<Tensor> {
        let data = weighted_sum(&[(self.latents, Some(latents)), (self.prediction, Some(prediction))])?;
        Ok(match self.limit {
            Some(limit) => data.clamp(-limit, limit)?,
            None => data,
        })
    }
}

/// `numpy.linspace(first, last, points)`: first + i * gap, the last put in exactly.
pub(crate) fn linspace(first: f64, last: f64, points: usize) -> Vec<f64> {
    let gap = (last - first) / (points.max(2) - 1) as f64;
    let value = |index| if index > 0 && index + 1 == points { last } else { index as f64 * gap + first };
    (0..points).map(value).collect()
}

/// Terms of weight 0 are left out, so that they may be missing; a weight of 1 leaves its tensor as it is.
fn weighted_sum(terms: &[(f64, Option<&Tensor>)]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (weight, tensor) in terms.iter().filter(|(weight, _)| *weight != 0.0) {
        let Some(tensor) = tensor else {
            return Err(SamplingError::BadSetting(
                "history: a step needs that of the step before; begin at 0".to_owned(),
            ));
        };
        let term = if *weight == 1.0 { (*tensor).clone() } else { (*tensor * *weight)? };
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| SamplingError::BadSetting("a step that keeps nothing of the latents".to_owned()))
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
        let (schedule, latents) = (flow(process), tensor(&[2.0, 2.0]));
        assert_eq!(schedule.timestep(1, &latents).unwrap().to_vec1::<f32>().unwrap(), [timestep; 2], "{process:?}");
        let moved = schedule.step(1, &latents, &tensor(&[3.0, 3.0]), &mut History::default()).unwrap();
        assert_eq!(moved.to_vec1::<f32>().unwrap(), [after; 2], "{process:?}");
    }

    #[test]
    fn a_family_takes_its_own_times_and_predicts_in_its_own_sense() {
        check(NoiseProcess::FlowMatching { time_scale: 1.0 }, 0.75, 1.25);
        check(NoiseProcess::FlowMatching { time_scale: 1000.0 }, 750.0, 1.25);
        check(NoiseProcess::ReversedFlow, 0.25, 2.75);
    }

    /// 1 / 3 in bf16 lies 0.04 % off; 333.3 in bf16 is 334.
    #[test]
    fn only_the_times_of_flux_are_rounded_to_the_format_of_the_latents() {
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
        let (latents, mut history) = (tensor(&[1.0]), History::default());
        assert!(schedule.step(1, &latents, &latents, &mut history).unwrap_err().to_string().contains("history"));
        schedule.step(0, &latents, &latents, &mut history).unwrap();
        schedule.step(1, &latents, &latents, &mut history).unwrap();
    }
}
