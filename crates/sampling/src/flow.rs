//! [`FlowMatchEuler`]: diffusers' `FlowMatchEulerDiscreteScheduler`, as `FluxPipeline` and `StableDiffusion3Pipeline`
//! use it (Esser et al., arXiv 2403.03206, section 5.3.2 for the shift).

use crate::config::{AcceptedKeys, bad, class};
use crate::schedule::{StepCoefficients, linspace};
use crate::{Result, SamplingError, Schedule};
use clearform_models::{NoiseProcess, StepSpacing};
use serde::Deserialize;
use serde_json::Value;

/// diffusers' `FlowMatchEulerDiscreteScheduler`. Absent keys of its config have the defaults of the class.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct FlowMatchEuler {
    num_train_timesteps: u32,
    shift: f64,
    use_dynamic_shifting: bool,
    base_shift: f64,
    max_shift: f64,
    base_image_seq_len: usize,
    max_image_seq_len: usize,
    shift_terminal: Option<f64>,
    time_shift_type: TimeShift,
    #[serde(skip)]
    spacing: StepSpacing,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TimeShift {
    Exponential,
    Linear,
}

/// More denoising steps than any image gains from; their schedule would only fill the memory.
const MOST_STEPS: usize = 100_000;

const ACCEPTED: AcceptedKeys = AcceptedKeys {
    class: class::FLOW_MATCH,
    unsupported: &[
        "invert_sigmas",
        "stochastic_sampling",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
    ],
    choices: &[("time_shift_type", &["exponential", "linear"])],
};

impl FlowMatchEuler {
    /// Reads scheduler_config.json. As in diffusers, keys that the class does not have are ignored.
    ///
    /// # Errors
    /// [`SamplingError::BadScheduler`] for another scheduler class, an option that is not supported, or a value of the
    /// wrong type.
    pub fn from_config(config: &Value) -> Result<Self> {
        ACCEPTED.read::<Self>(config)?.check()
    }

    /// Sets how sigmas are spaced before they are shifted.
    #[must_use]
    pub fn spaced(self, spacing: StepSpacing) -> Self {
        Self { spacing, ..self }
    }

    /// `set_timesteps` for `steps` steps over an image of `image_tokens` tokens, with the coefficients of each step.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`] for 0 steps, or more than 100,000.
    pub fn schedule(&self, steps: usize, image_tokens: usize) -> Result<Schedule> {
        if !(1..=MOST_STEPS).contains(&steps) {
            return Err(SamplingError::BadSetting(format!("steps: expected 1 to {MOST_STEPS}, found {steps}")));
        }
        let mut sigmas: Vec<f32> = match self.spacing {
            StepSpacing::Even => {
                let even = linspace(1.0, 1.0 / steps as f64, steps);
                even.into_iter().map(|sigma| self.shifted(sigma as f32, image_tokens)).collect()
            }
            StepSpacing::Trained => {
                self.trained(steps).into_iter().map(|sigma| self.shifted_in_f64(sigma, image_tokens) as f32).collect()
            }
        };
        if let Some(terminal) = self.shift_terminal.filter(|&terminal| terminal != 0.0) {
            stretch(&mut sigmas, terminal);
        }
        sigmas.push(0.0);
        let coefficients = sigmas.windows(2).map(|pair| StepCoefficients::euler(pair[1] - pair[0])).collect();
        let timesteps = sigmas.iter().take(steps).map(|sigma| sigma * self.num_train_timesteps as f32).collect();
        Schedule::new(NoiseProcess::FlowMatching { time_scale: 1.0 }, sigmas, timesteps, coefficients)
    }

    /// The sigmas of `set_timesteps(steps)` before shifting: evenly from the largest training sigma to the smallest. As
    /// in diffusers, a static shift is already contained in these two, and is applied again afterwards.
    fn trained(&self, steps: usize) -> Vec<f64> {
        let count = f64::from(self.num_train_timesteps);
        let training_sigma =
            |sigma: f32| f64::from(if self.use_dynamic_shifting { sigma } else { self.shifted(sigma, 0) });
        let largest = training_sigma(1.0);
        let smallest = training_sigma(1.0 / self.num_train_timesteps as f32);
        linspace(largest * count, smallest * count, steps).into_iter().map(|timestep| timestep / count).collect()
    }

    /// `calculate_shift` of FluxPipeline: mu is linear in the number of image tokens.
    fn mu(&self, image_tokens: usize) -> f64 {
        let span = self.max_image_seq_len as f64 - self.base_image_seq_len as f64;
        let slope = (self.max_shift - self.base_shift) / span;
        image_tokens as f64 * slope + (self.base_shift - slope * self.base_image_seq_len as f64)
    }

    /// The shifted sigma. Operations are in f32 in diffusers' order; scalars are computed in f64 and rounded once, as
    /// in numpy.
    fn shifted(&self, sigma: f32, image_tokens: usize) -> f32 {
        if !self.use_dynamic_shifting {
            return self.shift as f32 * sigma / (1.0 + (self.shift - 1.0) as f32 * sigma);
        }
        let shift = self.dynamic_shift(image_tokens) as f32;
        shift / (shift + (1.0 / sigma - 1.0))
    }

    /// The same for sigmas that diffusers has in f64.
    fn shifted_in_f64(&self, sigma: f64, image_tokens: usize) -> f64 {
        if !self.use_dynamic_shifting {
            return self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma);
        }
        let shift = self.dynamic_shift(image_tokens);
        shift / (shift + (1.0 / sigma - 1.0))
    }

    /// The shift factor that the image size implies: exp(mu), or mu (`time_shift`).
    fn dynamic_shift(&self, image_tokens: usize) -> f64 {
        let mu = self.mu(image_tokens);
        match self.time_shift_type {
            TimeShift::Exponential => mu.exp(),
            TimeShift::Linear => mu,
        }
    }

    fn check(self) -> Result<Self> {
        if self.num_train_timesteps == 0 {
            return Err(bad("num_train_timesteps", "expected at least 1, found 0"));
        }
        if self.use_dynamic_shifting && self.max_image_seq_len == self.base_image_seq_len {
            return Err(bad(
                "max_image_seq_len",
                format!("expected a number other than base_image_seq_len = {}", self.base_image_seq_len),
            ));
        }
        if self.shift_terminal.is_some_and(|terminal| !(0.0..1.0).contains(&terminal)) {
            return Err(bad("shift_terminal", "expected a number of at least 0 and below 1"));
        }
        Ok(self)
    }
}

impl Default for FlowMatchEuler {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            shift_terminal: None,
            time_shift_type: TimeShift::Exponential,
            spacing: StepSpacing::Even,
        }
    }
}

/// diffusers' `stretch_shift_to_terminal`: stretches the sigmas so that the last one is `terminal`.
fn stretch(sigmas: &mut [f32], terminal: f64) {
    let Some(&last) = sigmas.last() else { return };
    let scale = (1.0 - last) / (1.0 - terminal) as f32;
    sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - (1.0 - *sigma) / scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SolverState;
    use candle_core::{DType, Device, Tensor};
    use serde_json::json;

    fn cases() -> Vec<Value> {
        let all: Value = serde_json::from_str(include_str!("../fixtures/schedules.json")).unwrap();
        all["schedules"].as_array().unwrap().clone()
    }

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
    }

    fn schedule_of(case: &Value) -> Schedule {
        let steps = case["steps"].as_u64().unwrap();
        let tokens = case["tokens"].as_u64().unwrap();
        FlowMatchEuler::from_config(&case["config"]).unwrap().schedule(steps as usize, tokens as usize).unwrap()
    }

    fn check(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        for (index, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= tolerance, "{what}, value {index}: {got} instead of {want}");
        }
    }

    #[test]
    fn sigmas_and_timesteps_match_diffusers() {
        for case in cases() {
            let schedule = schedule_of(&case);
            let latents = Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap();
            let timesteps = (0..schedule.steps())
                .map(|index| schedule.timestep(index, &latents).unwrap().to_vec1::<f32>().unwrap()[0])
                .collect::<Vec<_>>();
            check(schedule.sigmas(), &floats(&case["sigmas"]), 0.0, &format!("sigmas of {case}"));
            check(&timesteps, &floats(&case["timesteps"]), 0.0, &format!("timesteps of {case}"));
        }
    }

    #[test]
    fn euler_steps_match_diffusers() {
        for case in cases() {
            let schedule = schedule_of(&case);
            let mut latents =
                Tensor::new(&[-2_f32, -4.0 / 3.0, -2.0 / 3.0, 0.0, 2.0 / 3.0, 4.0 / 3.0, 2.0], &Device::Cpu).unwrap();
            for index in 0..schedule.steps() {
                let velocity = latents.affine(0.5, -f64::from(schedule.sigmas()[index])).unwrap();
                latents = schedule.step(index, &latents, &velocity, &mut SolverState::default()).unwrap();
            }
            check(&latents.to_vec1().unwrap(), &floats(&case["after"]), 1e-6, &format!("latents of {case}"));
        }
    }

    #[test]
    fn unsupported_options_are_refused_by_name() {
        for (key, config) in [
            ("use_karras_sigmas", json!({"use_karras_sigmas": true})),
            ("invert_sigmas", json!({"invert_sigmas": true})),
            ("stochastic_sampling", json!({"stochastic_sampling": true})),
            ("_class_name", json!({"_class_name": "DDIMScheduler"})),
            ("time_shift_type", json!({"time_shift_type": "cubic"})),
            ("shift_terminal", json!({"shift_terminal": 1.5})),
            ("(whole file)", json!({"shift": "three"})),
            ("max_image_seq_len", json!({"use_dynamic_shifting": true, "base_image_seq_len": 4096})),
        ] {
            let found = FlowMatchEuler::from_config(&config).unwrap_err();
            assert!(
                matches!(found, SamplingError::BadScheduler { key: named, .. } if named == key),
                "{config}: {found}"
            );
        }
        let error = FlowMatchEuler::default().schedule(0, 256).unwrap_err().to_string();
        assert!(error.contains("expected 1 to 100000, found 0"), "{error}");
    }
}
