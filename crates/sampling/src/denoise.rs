//! [`denoise`]: the loop from noise to latents. It knows no family and no file.

use crate::{Guidance, Result, SamplingError, Schedule};
use candle_core::{DType, Tensor};
use clearform_models::{Denoiser, Moment};

/// A step that is done.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Steps done, from 1 on.
    pub done: usize,
    /// Steps in all.
    pub steps: usize,
    /// The noise level that is left.
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
    progress: &mut dyn FnMut(&Progress),
) -> Result<Tensor> {
    let steps = schedule.steps();
    let mut latents = latents.clone();
    for index in 0..steps {
        let timestep = schedule.timestep(index, &latents)?;
        let velocity = guidance.predict(denoiser, &latents, &timestep, Moment { index, steps })?;
        if !is_finite(&velocity)? {
            return Err(SamplingError::NotFinite { step: index + 1, steps });
        }
        latents = schedule.step(index, &latents, &velocity)?;
        progress(&Progress { done: index + 1, steps, sigma: schedule.sigmas()[index + 1], latents: &latents });
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
    use crate::FlowMatchEuler;
    use candle_core::Device;
    use clearform_models::{Conditions, DenoiserInput, ModelError, State};

    /// Predicts pooled * latents + timestep, to follow by hand.
    struct Line;

    impl Denoiser for Line {
        fn layers(&self) -> &[String] {
            &[]
        }
        fn embed(&self, _: &DenoiserInput) -> clearform_models::Result<State> {
            Err(refusal())
        }
        fn block(&self, _: usize, _: State) -> clearform_models::Result<State> {
            Err(refusal())
        }
        fn head(&self, _: &State) -> clearform_models::Result<Tensor> {
            Err(refusal())
        }
        fn forward(&self, input: &DenoiserInput) -> clearform_models::Result<Tensor> {
            let pooled = input.conditions.pooled.as_ref().unwrap();
            Ok(input.latents.broadcast_mul(pooled)?.broadcast_add(&input.timestep)?)
        }
    }

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
        let result = denoise(&Line, &latents, &schedule, guidance, &mut |step| seen.push((step.done, step.sigma)));
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
