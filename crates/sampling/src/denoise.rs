//! [`denoise`]: the denoising loop, from noise to latents.

use crate::{Guidance, Result, SamplingError, Schedule, SolverState};
use candle_core::{DType, Tensor};
use clearform_models::{Denoiser, StepIndex};

/// Progress after a step, for hooks.
#[derive(Debug)]
pub struct StepProgress<'a> {
    /// Number of finished steps, at least 1.
    pub done: usize,
    /// Number of steps.
    pub steps: usize,
    /// Noise level after the step: see [`Schedule::sigmas`].
    pub sigma: f32,
    /// Latents after the step.
    pub latents: &'a Tensor,
}

/// Where denoising starts: with noise at step 0, or with an image that was noised to the level of a later step (image
/// to image).
#[derive(Debug, Clone)]
pub struct Start {
    /// Noisy latents as the model takes them.
    pub latents: Tensor,
    /// The first step to compute, counted from 0.
    pub step: usize,
}

impl Start {
    /// Starts at the first step.
    pub fn from_noise(latents: Tensor) -> Self {
        Self { latents, step: 0 }
    }
}

/// What denoising does after a step.
#[derive(Debug, Clone)]
pub enum StepAction {
    /// Goes on with the latents of the step.
    Continue,
    /// Goes on with these latents instead: inpainting pastes what is to stay.
    Replace(Tensor),
    /// Ends with [`SamplingError::Cancelled`].
    Cancel,
}

/// Denoises from `start` along `schedule`, and calls `hook` after each step. This is the only denoising loop.
///
/// # Shapes
/// Latents as the model takes them -> the same.
///
/// # Errors
/// [`SamplingError::NotFinite`] at the first step whose prediction contains NaN or infinity,
/// [`SamplingError::Cancelled`] if the hook cancels, [`SamplingError::BadSetting`] for a start after the last step;
/// errors of the model.
pub fn denoise(
    denoiser: &dyn Denoiser,
    start: Start,
    schedule: &Schedule,
    guidance: &Guidance,
    hook: &mut dyn FnMut(&StepProgress) -> StepAction,
) -> Result<Tensor> {
    let steps = schedule.steps();
    let Start { mut latents, step: first } = start;
    if first >= steps {
        return Err(SamplingError::BadSetting(format!("start: expected a step below {steps}, found {first}")));
    }
    let mut history = SolverState::default();
    for index in first..steps {
        let timestep = schedule.timestep(index, &latents)?;
        let prediction = guidance.predict(denoiser, &latents, &timestep, StepIndex { index, steps })?;
        if !is_finite(&prediction)? {
            return Err(SamplingError::NotFinite { step: index + 1, steps });
        }
        latents = schedule.step(index, &latents, &prediction, &mut history)?;
        let done = index + 1;
        match hook(&StepProgress { done, steps, sigma: schedule.sigmas()[done], latents: &latents }) {
            StepAction::Continue => {}
            StepAction::Replace(replaced) => latents = replaced,
            StepAction::Cancel => return Err(SamplingError::Cancelled),
        }
    }
    Ok(latents)
}

/// Multiplying by zero keeps NaN and turns infinity into NaN, so the sum is 0 only if all values are finite.
fn is_finite(tensor: &Tensor) -> Result<bool> {
    let zero = (tensor.to_dtype(DType::F32)? * 0.0)?.sum_all()?.to_scalar::<f32>()?;
    Ok(zero == 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DpmSolver, FlowMatchEuler};
    use candle_core::Device;
    use clearform_models::{Conditions, DenoiserInput, HiddenState, ModelError};
    use serde_json::json;

    /// A model that has no blocks, only a forward.
    struct ForwardOnly(fn(&DenoiserInput) -> clearform_models::Result<Tensor>);

    impl Denoiser for ForwardOnly {
        fn layer_names(&self) -> &[String] {
            &[]
        }
        fn embed(&self, _: &DenoiserInput) -> clearform_models::Result<HiddenState> {
            Err(refusal())
        }
        fn block(&self, _: usize, _: HiddenState) -> clearform_models::Result<HiddenState> {
            Err(refusal())
        }
        fn head(&self, _: &HiddenState) -> clearform_models::Result<Tensor> {
            Err(refusal())
        }
        fn forward(&self, input: &DenoiserInput) -> clearform_models::Result<Tensor> {
            self.0(input)
        }
    }

    /// Predicts pooled * latents + timestep, which is easy to compute by hand.
    const LINEAR: ForwardOnly = ForwardOnly(|input| {
        let pooled = input.conditions.pooled.as_ref().unwrap();
        Ok(input.latents.broadcast_mul(pooled)?.broadcast_add(&input.timestep)?)
    });

    fn refusal() -> ModelError {
        ModelError::BadInput { name: "latents".to_owned(), reason: "only forward is implemented".to_owned() }
    }

    fn conditions(pooled: f32) -> Conditions {
        Conditions { pooled: Some(Tensor::new(&[pooled], &Device::Cpu).unwrap()), ..Conditions::default() }
    }

    fn run(guidance: &Guidance) -> (Result<Tensor>, Vec<(usize, f32)>) {
        let schedule = FlowMatchEuler::default().schedule(2, 4).unwrap();
        let latents = Tensor::new(&[2_f32], &Device::Cpu).unwrap();
        let mut seen = Vec::new();
        let mut keep = |step: &StepProgress| {
            seen.push((step.done, step.sigma));
            StepAction::Continue
        };
        let result = denoise(&LINEAR, Start::from_noise(latents), &schedule, guidance, &mut keep);
        (result, seen)
    }

    /// Sigmas 1, 0.5, 0. With p = 0.5: x = 2 - 0.5 (1 + 1) = 1, then 1 - 0.5 (0.5 + 0.5) = 0.5.
    #[test]
    fn two_steps_match_hand_computed_values() {
        let (latents, seen) = run(&Guidance::SingleEvaluation(conditions(0.5)));
        assert_eq!(latents.unwrap().to_vec1::<f32>().unwrap(), [0.5]);
        assert_eq!(seen, [(1, 0.5), (2, 0.0)]);
    }

    /// Scale 3 between p = 0.25 and 0.5 is p = 1: x = 2 - 0.5 (2 + 1) = 0.5, then 0.5 - 0.5 (0.5 + 0.5) = 0.
    #[test]
    fn classifier_free_guidance_matches_hand_computed_values() {
        let guidance = Guidance::new(conditions(0.5), Some(conditions(0.25)), 3.0).unwrap();
        assert!(matches!(guidance, Guidance::ClassifierFree { .. }));
        assert_eq!(run(&guidance).0.unwrap().to_vec1::<f32>().unwrap(), [0.0]);
    }

    /// Values of DPMSolverMultistepScheduler in diffusers 0.42.1 for predictions 0.5 x + t of x0. The second and third
    /// depend on the history.
    #[test]
    fn steps_use_the_history() {
        let config = json!({"prediction_type": "sample"});
        let schedule = DpmSolver::from_config(&config).unwrap().schedule(4).unwrap();
        let latents = Tensor::new(&[2_f32], &Device::Cpu).unwrap();
        let mut seen = Vec::new();
        let guidance = Guidance::SingleEvaluation(conditions(0.5));
        let mut keep = |step: &StepProgress| {
            seen.push(step.latents.to_vec1::<f32>().unwrap()[0]);
            StepAction::Continue
        };
        denoise(&LINEAR, Start::from_noise(latents), &schedule, &guidance, &mut keep).unwrap();
        let want = [53.538_3_f32, 206.444_5, 427.402_6, 463.701_3];
        assert_eq!(seen.len(), want.len());
        assert!(seen.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-5 * want), "{seen:?}");
    }

    /// Predicts six channels for three of the latents: 1 to 6 for conditions without pooled text, else -1 to -6.
    const WITH_VARIANCE: ForwardOnly = ForwardOnly(|input| {
        let sign = if input.conditions.pooled.is_some() { -1.0 } else { 1.0 };
        let channels = Tensor::new(&[1_f32, 2.0, 3.0, 4.0, 5.0, 6.0], &Device::Cpu)?;
        Ok((channels.reshape((1, 6, 1, 1))? * sign)?)
    });

    fn denoise_with_variance(guidance: &Guidance) -> Result<Vec<f32>> {
        let latents = Tensor::zeros((1, 3, 1, 1), DType::F32, &Device::Cpu)?;
        let schedule = FlowMatchEuler::default().schedule(1, 1)?;
        let start = Start::from_noise(latents);
        Ok(denoise(&WITH_VARIANCE, start, &schedule, guidance, &mut |_| StepAction::Continue)?
            .flatten_all()?
            .to_vec1()?)
    }

    #[test]
    fn a_learned_variance_is_dropped() {
        assert_eq!(
            denoise_with_variance(&Guidance::SingleEvaluation(Conditions::default())).unwrap(),
            [-1.0, -2.0, -3.0]
        );
    }

    /// Scale 2 from -c through c is 3 c. One step from 0 subtracts the prediction.
    #[test]
    fn only_the_given_number_of_channels_is_guided() {
        let guided = |scale, channels| {
            denoise_with_variance(
                &Guidance::classifier_free(Conditions::default(), conditions(0.0), scale, channels).unwrap(),
            )
        };
        assert_eq!(guided(2.0, None).unwrap(), [-3.0, -6.0, -9.0]);
        assert_eq!(guided(2.0, Some(2)).unwrap(), [-3.0, -6.0, -3.0]);
        assert_eq!(guided(2.0, Some(3)).unwrap(), [-3.0, -6.0, -9.0]);
        assert_eq!(guided(0.5, Some(1)).unwrap(), [0.0, -2.0, -3.0]);
        assert_eq!(guided(1.0, Some(1)).unwrap(), [-1.0, -2.0, -3.0]);
        for channels in [0, 4] {
            let error = guided(2.0, Some(channels)).unwrap_err().to_string();
            assert!(error.contains(&format!("expected 1 to 3, found {channels}")), "{error}");
        }
        let infinite = Guidance::classifier_free(Conditions::default(), conditions(0.0), f64::INFINITY, None);
        assert!(infinite.unwrap_err().to_string().contains("expected a finite number, found inf"));
    }

    #[test]
    fn without_a_scale_above_1_the_negative_is_not_evaluated() {
        for (negative, scale) in [(None, 3.0), (Some(conditions(0.25)), 1.0)] {
            assert!(matches!(Guidance::new(conditions(0.5), negative, scale).unwrap(), Guidance::SingleEvaluation(_)));
        }
        let error = Guidance::new(conditions(0.5), None, f64::NAN).unwrap_err().to_string();
        assert!(error.contains("expected a finite number, found NaN"), "{error}");
    }

    fn from(start: Start, hook: &mut dyn FnMut(&StepProgress) -> StepAction) -> Result<Vec<f32>> {
        let schedule = FlowMatchEuler::default().schedule(2, 4)?;
        let guidance = Guidance::SingleEvaluation(conditions(0.5));
        Ok(denoise(&LINEAR, start, &schedule, &guidance, hook)?.to_vec1()?)
    }

    fn latents(value: f32) -> Tensor {
        Tensor::new(&[value], &Device::Cpu).unwrap()
    }

    /// The second step of `two_steps_match_hand_computed_values` alone: 1 - 0.5 (0.5 + 0.5) = 0.5.
    #[test]
    fn denoising_starts_at_any_step() {
        let start = Start { latents: latents(1.0), step: 1 };
        assert_eq!(from(start, &mut |_| StepAction::Continue).unwrap(), [0.5]);
        let error = from(Start { latents: latents(1.0), step: 2 }, &mut |_| StepAction::Continue).unwrap_err();
        assert_eq!(error.to_string(), "start: expected a step below 2, found 2");
    }

    /// 2 instead of 1 after the first step: 2 - 0.5 (1 + 0.5) = 1.25.
    #[test]
    fn the_hook_may_replace_latents() {
        let mut hook = |step: &StepProgress| match step.done {
            1 => StepAction::Replace(latents(2.0)),
            _ => StepAction::Continue,
        };
        assert_eq!(from(Start::from_noise(latents(2.0)), &mut hook).unwrap(), [1.25]);
    }

    #[test]
    fn the_hook_may_cancel() {
        let mut seen = 0;
        let mut hook = |_: &StepProgress| {
            seen += 1;
            StepAction::Cancel
        };
        let error = from(Start::from_noise(latents(2.0)), &mut hook).unwrap_err();
        assert!(matches!(error, SamplingError::Cancelled), "{error}");
        assert_eq!(seen, 1);
    }

    #[test]
    fn a_prediction_that_is_not_finite_stops_the_loop() {
        for pooled in [f32::NAN, f32::INFINITY] {
            let (result, seen) = run(&Guidance::SingleEvaluation(conditions(pooled)));
            assert!(matches!(result, Err(SamplingError::NotFinite { step: 1, steps: 2 })));
            assert!(seen.is_empty());
        }
    }
}
