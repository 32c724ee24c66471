//! [`denoise`]: the loop from noise to latents. It knows no family and no file.

use crate::{Guidance, History, Result, SamplingError, Schedule};
use candle_core::{DType, Tensor};
use clearform_models::{Denoiser, StepIndex};

/// A step that is done.
#[derive(Debug)]
pub struct StepProgress<'a> {
    /// Steps done, from 1 on.
    pub done: usize,
    /// Steps in all.
    pub steps: usize,
    /// The noise level that is left, as [`Schedule::sigmas`] counts it.
    pub sigma: f32,
    /// The latents at that level.
    pub latents: &'a Tensor,
}

/// Steps `latents`, which are noise, down `schedule`, and calls `progress` after each step.
///
/// # Shapes
/// latents as the model takes them; so is the result.
///
/// # Errors
/// [`SamplingError::NotFinite`] at the first step whose prediction holds NaN or infinity; what the model refuses.
pub fn denoise(
    denoiser: &dyn Denoiser,
    latents: &Tensor,
    schedule: &Schedule,
    guidance: &Guidance,
    progress: &mut dyn FnMut(&StepProgress),
) -> Result<Tensor> {
    let steps = schedule.steps();
    let (mut latents, mut history) = (latents.clone(), History::default());
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

/// A product with zero keeps NaN and turns infinity into NaN, so that one sum answers for all values.
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

    /// A model that is its forward.
    struct WholeForward(fn(&DenoiserInput) -> clearform_models::Result<Tensor>);

    impl Denoiser for WholeForward {
        fn layers(&self) -> &[String] {
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

    /// Predicts pooled * latents + timestep, to follow by hand.
    const LINE: WholeForward = WholeForward(|input| {
        let pooled = input.conditions.pooled.as_ref().unwrap();
        Ok(input.latents.broadcast_mul(pooled)?.broadcast_add(&input.timestep)?)
    });

    fn refusal() -> ModelError {
        ModelError::BadInput { name: "latents".to_owned(), reason: "only forward is here".to_owned() }
    }

    fn conditions(pooled: f32) -> Conditions {
        Conditions { pooled: Some(Tensor::new(&[pooled], &Device::Cpu).unwrap()), ..Conditions::default() }
    }

    fn run(guidance: &Guidance) -> (Result<Tensor>, Vec<(usize, f32)>) {
        let schedule = FlowMatchEuler::default().schedule(2, 4).unwrap();
        let latents = Tensor::new(&[2_f32], &Device::Cpu).unwrap();
        let mut seen = Vec::new();
        let result = denoise(&LINE, &latents, &schedule, guidance, &mut |step| seen.push((step.done, step.sigma)));
        (result, seen)
    }

    /// Sigmas 1, 0.5, 0. With p = 0.5: x = 2 - 0.5 (1 + 1) = 1, then 1 - 0.5 (0.5 + 0.5) = 0.5.
    #[test]
    fn two_steps_by_hand() {
        let (latents, seen) = run(&Guidance::Embedded(conditions(0.5)));
        assert_eq!(latents.unwrap().to_vec1::<f32>().unwrap(), [0.5]);
        assert_eq!(seen, [(1, 0.5), (2, 0.0)]);
    }

    /// Scale 3 between p = 0.25 and 0.5 is p = 1: x = 2 - 0.5 (2 + 1) = 0.5, then 0.5 - 0.5 (0.5 + 0.5) = 0.
    #[test]
    fn classifier_free_guidance_by_hand() {
        let guidance = Guidance::new(conditions(0.5), Some(conditions(0.25)), 3.0).unwrap();
        assert!(matches!(guidance, Guidance::ClassifierFree { .. }));
        assert_eq!(run(&guidance).0.unwrap().to_vec1::<f32>().unwrap(), [0.0]);
    }

    /// DPMSolverMultistepScheduler of diffusers 0.42.1 with the predictions 0.5 x + t, taken as x0: without the step
    /// before, the second and the third of these numbers would be others.
    #[test]
    fn each_step_knows_the_one_before() {
        let config = json!({"prediction_type": "sample"});
        let schedule = DpmSolver::from_config(&config).unwrap().schedule(4).unwrap();
        let (latents, mut seen) = (Tensor::new(&[2_f32], &Device::Cpu).unwrap(), Vec::new());
        let guidance = Guidance::Embedded(conditions(0.5));
        let mut keep = |step: &StepProgress| seen.push(step.latents.to_vec1::<f32>().unwrap()[0]);
        denoise(&LINE, &latents, &schedule, &guidance, &mut keep).unwrap();
        let want = [53.538_3_f32, 206.444_5, 427.402_6, 463.701_3];
        assert_eq!(seen.len(), want.len());
        assert!(seen.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-5 * want), "{seen:?}");
    }

    /// Twice as many channels as latents have, all different: 1 to 6 for conditions without pooled text, else -1 to -6.
    const WIDE: WholeForward = WholeForward(|input| {
        let sign = if input.conditions.pooled.is_some() { -1.0 } else { 1.0 };
        let channels = Tensor::new(&[1_f32, 2.0, 3.0, 4.0, 5.0, 6.0], &Device::Cpu)?;
        Ok((channels.reshape((1, 6, 1, 1))? * sign)?)
    });

    fn wide(guidance: &Guidance) -> Result<Vec<f32>> {
        let latents = Tensor::zeros((1, 3, 1, 1), DType::F32, &Device::Cpu)?;
        let schedule = FlowMatchEuler::default().schedule(1, 1)?;
        Ok(denoise(&WIDE, &latents, &schedule, guidance, &mut |_| ())?.flatten_all()?.to_vec1()?)
    }

    #[test]
    fn a_learned_variance_is_left_out() {
        assert_eq!(wide(&Guidance::Embedded(Conditions::default())).unwrap(), [-1.0, -2.0, -3.0]);
    }

    /// Scale 2 from -c through c is 3 c; one step from 0 takes the prediction off.
    #[test]
    fn as_many_channels_are_guided_as_are_told() {
        let guided = |scale, channels| {
            wide(&Guidance::classifier_free(Conditions::default(), conditions(0.0), scale, channels).unwrap())
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
        assert!(Guidance::classifier_free(Conditions::default(), conditions(0.0), f64::INFINITY, None).is_err());
    }

    #[test]
    fn without_need_the_negative_is_not_evaluated() {
        for (negative, scale) in [(None, 3.0), (Some(conditions(0.25)), 1.0)] {
            assert!(matches!(Guidance::new(conditions(0.5), negative, scale).unwrap(), Guidance::Embedded(_)));
        }
        assert!(Guidance::new(conditions(0.5), None, f64::NAN).is_err());
    }

    #[test]
    fn a_prediction_that_is_not_finite_stops_the_loop() {
        for pooled in [f32::NAN, f32::INFINITY] {
            let (result, seen) = run(&Guidance::Embedded(conditions(pooled)));
            assert!(matches!(result, Err(SamplingError::NotFinite { step: 1, steps: 2 })));
            assert!(seen.is_empty());
        }
    }
}
