//! [`denoise`]: the denoising loop, from noise to latents.

use crate::{Guidance, Result, SamplingError, Schedule, SolverState};
use candle_core::{DType, Tensor};
use clearform_models::{Denoiser, StepIndex};

/// Progress after a step, for callbacks.
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

/// Denoises `latents` along `schedule`, and calls `progress` after each step.
///
/// # Shapes
/// latents as the model takes them -> the same.
///
/// # Errors
/// [`SamplingError::NotFinite`] at the first step whose prediction contains NaN or infinity; errors of the model.
pub fn denoise(
    denoiser: &dyn Denoiser,
    latents: &Tensor,
    schedule: &Schedule,
    guidance: &Guidance,
    progress: &mut dyn FnMut(&StepProgress),
) -> Result<Tensor> {
    let steps = schedule.steps();
    let mut latents = latents.clone();
    let mut history = SolverState::default();
    for index in 0..steps {
        let timestep = schedule.timestep(index, &latents)?;
        let prediction = guidance.predict(denoiser, &latents, &timestep, StepIndex { index, steps })?;
        if !is_finite(&prediction)? {
            return Err(SamplingError::NotFinite { step: index + 1, steps });
        }
        latents = schedule.step(index, &latents, &prediction, &mut history)?;
        progress(&StepProgress { done: index + 1, steps, sigma: schedule.sigmas()[index + 1], latents: &latents });
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
        let result = denoise(&LINEAR, &latents, &schedule, guidance, &mut |step| seen.push((step.done, step.sigma)));
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
        let mut keep = |step: &StepProgress| seen.push(step.latents.to_vec1::<f32>().unwrap()[0]);
        denoise(&LINEAR, &latents, &schedule, &guidance, &mut keep).unwrap();
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
        Ok(denoise(&WITH_VARIANCE, &latents, &schedule, guidance, &mut |_| ())?.flatten_all()?.to_vec1()?)
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

    #[test]
    fn a_prediction_that_is_not_finite_stops_the_loop() {
        for pooled in [f32::NAN, f32::INFINITY] {
            let (result, seen) = run(&Guidance::SingleEvaluation(conditions(pooled)));
            assert!(matches!(result, Err(SamplingError::NotFinite { step: 1, steps: 2 })));
            assert!(seen.is_empty());
        }
    }
}
