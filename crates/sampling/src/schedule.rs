//! [`FlowMatchEuler`]: the noise levels of a rectified flow as diffusers' `FlowMatchEulerDiscreteScheduler` computes
//! them when `FluxPipeline` drives it, and [`Schedule`], those of one picture. It knows no model.

use crate::{Result, SamplingError};
use candle_core::{DType, Tensor};
use serde::Deserialize;
use serde_json::Value;

/// scheduler_config.json, with the defaults of the diffusers class.
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
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TimeShift {
    Exponential,
    Linear,
}

/// Noise levels from 1 to 0: one per step, and the last.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    sigmas: Vec<f32>,
    train_timesteps: f32,
}

impl FlowMatchEuler {
    /// Reads scheduler_config.json. Keys of diffusers that are not for this class of schedule are ignored, as there.
    ///
    /// # Errors
    /// [`SamplingError::BadScheduler`] for another scheduler class, an option that is not supported and set, or a
    /// value of the wrong kind.
    pub fn from_config(config: &Value) -> Result<Self> {
        refuse_other_class(config)?;
        UNSUPPORTED.iter().try_for_each(|key| refuse_if_set(config, key))?;
        let scheduler: Self = serde_json::from_value(config.clone())
            .map_err(|error| SamplingError::BadScheduler { key: "(whole file)", reason: error.to_string() })?;
        scheduler.check()
    }

    /// The noise levels for `steps` steps over a picture of `image_tokens` tokens.
    ///
    /// # Errors
    /// [`SamplingError::BadSetting`] for no step at all.
    pub fn schedule(&self, steps: usize, image_tokens: usize) -> Result<Schedule> {
        if steps == 0 {
            return Err(SamplingError::BadSetting("steps: expected at least 1, found 0".to_owned()));
        }
        let mut sigmas = evenly_spaced(steps);
        sigmas.iter_mut().for_each(|sigma| *sigma = self.shifted(*sigma, image_tokens));
        if let Some(terminal) = self.shift_terminal.filter(|&terminal| terminal != 0.0) {
            stretch(&mut sigmas, terminal);
        }
        sigmas.push(0.0);
        Ok(Schedule { sigmas, train_timesteps: self.num_train_timesteps as f32 })
    }

    /// `calculate_shift` of FluxPipeline: mu, linear in the number of image tokens.
    fn mu(&self, image_tokens: usize) -> f64 {
        let span = self.max_image_seq_len as f64 - self.base_image_seq_len as f64;
        let slope = (self.max_shift - self.base_shift) / span;
        image_tokens as f64 * slope + (self.base_shift - slope * self.base_image_seq_len as f64)
    }

    /// Each operation in f32, in diffusers' order; scalars are made in f64 and rounded once, as numpy does.
    fn shifted(&self, sigma: f32, image_tokens: usize) -> f32 {
        if !self.use_dynamic_shifting {
            return self.shift as f32 * sigma / (1.0 + (self.shift - 1.0) as f32 * sigma);
        }
        let mu = self.mu(image_tokens);
        let weight = match self.time_shift_type {
            TimeShift::Exponential => mu.exp() as f32,
            TimeShift::Linear => mu as f32,
        };
        weight / (weight + (1.0 / sigma - 1.0))
    }

    fn check(self) -> Result<Self> {
        let bad = |key, reason: &str| Err(SamplingError::BadScheduler { key, reason: reason.to_owned() });
        if self.num_train_timesteps == 0 {
            return bad("num_train_timesteps", "expected at least 1, found 0");
        }
        if self.use_dynamic_shifting && self.max_image_seq_len == self.base_image_seq_len {
            return bad("max_image_seq_len", "expected another number than base_image_seq_len");
        }
        if self.shift_terminal.is_some_and(|terminal| !(0.0..1.0).contains(&terminal)) {
            return bad("shift_terminal", "expected a number from 0 to below 1");
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
        }
    }
}

impl Schedule {
    /// How many steps there are.
    pub fn steps(&self) -> usize {
        self.sigmas.len() - 1
    }

    /// The noise levels, one more than steps: the first 1 (or near it), the last 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The timestep of step `index` as FluxPipeline hands it to the transformer, one per sample of `latents`:
    /// sigma * 1000, rounded to the latents' number format, / 1000.
    ///
    /// # Shapes
    /// latents (batch, ...) to (batch).
    ///
    /// # Errors
    /// The tensor library refused.
    pub fn timestep(&self, index: usize, latents: &Tensor) -> Result<Tensor> {
        let scaled = vec![self.sigmas[index] * self.train_timesteps; latents.dim(0)?];
        let scaled = Tensor::new(scaled, latents.device())?.to_dtype(latents.dtype())?;
        let thousand = Tensor::new(1000.0_f32, latents.device())?.to_dtype(latents.dtype())?;
        Ok(scaled.broadcast_div(&thousand)?)
    }

    /// Euler's step `index` along the predicted velocity: x + (sigma' - sigma) v, in f32, in the latents' format.
    ///
    /// # Shapes
    /// latents and velocity alike; so is the result.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn step(&self, index: usize, latents: &Tensor, velocity: &Tensor) -> Result<Tensor> {
        let change = f64::from(self.sigmas[index + 1] - self.sigmas[index]);
        let moved = (latents.to_dtype(DType::F32)? + (velocity.to_dtype(DType::F32)? * change)?)?;
        Ok(moved.to_dtype(latents.dtype())?)
    }
}

const UNSUPPORTED: &[&str] =
    &["invert_sigmas", "stochastic_sampling", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"];

fn refuse_if_set(config: &Value, key: &'static str) -> Result<()> {
    match config.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => Ok(()),
        Some(found) => Err(SamplingError::BadScheduler {
            key,
            reason: format!("expected false, found {found}: this option is not supported; set it to false"),
        }),
    }
}

fn refuse_other_class(config: &Value) -> Result<()> {
    match config.get("_class_name").and_then(Value::as_str) {
        None | Some("FlowMatchEulerDiscreteScheduler") => Ok(()),
        Some(found) => Err(SamplingError::BadScheduler {
            key: "_class_name",
            reason: format!("expected \"FlowMatchEulerDiscreteScheduler\", found {found:?}; use a model of that class"),
        }),
    }
}

/// `numpy.linspace(1, 1 / steps, steps)`, made in f64 and rounded: start + i * step, the end put in exactly.
fn evenly_spaced(steps: usize) -> Vec<f32> {
    let end = 1.0 / steps as f64;
    let gap = (end - 1.0) / (steps.max(2) - 1) as f64;
    let mut sigmas = (0..steps).map(|index| (index as f64 * gap + 1.0) as f32).collect::<Vec<_>>();
    if let (true, Some(last)) = (steps > 1, sigmas.last_mut()) {
        *last = end as f32;
    }
    sigmas
}

/// diffusers' `stretch_shift_to_terminal`: the last level becomes `terminal`.
fn stretch(sigmas: &mut [f32], terminal: f64) {
    let Some(&last) = sigmas.last() else { return };
    let scale = (1.0 - last) / (1.0 - terminal) as f32;
    sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - (1.0 - *sigma) / scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use serde_json::json;

    fn cases() -> Vec<Value> {
        let all: Value = serde_json::from_str(include_str!("../fixtures/numbers.json")).unwrap();
        all["schedules"].as_array().unwrap().clone()
    }

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
    }

    fn made(case: &Value) -> Schedule {
        let (steps, tokens) = (case["steps"].as_u64().unwrap(), case["tokens"].as_u64().unwrap());
        FlowMatchEuler::from_config(&case["config"]).unwrap().schedule(steps as usize, tokens as usize).unwrap()
    }

    fn check(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        for (index, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= tolerance, "{what}, value {index}: {got} instead of {want}");
        }
    }

    #[test]
    fn sigmas_and_timesteps_are_those_of_diffusers() {
        for case in cases() {
            let schedule = made(&case);
            let latents = Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap();
            let timesteps = (0..schedule.steps())
                .map(|index| schedule.timestep(index, &latents).unwrap().to_vec1::<f32>().unwrap()[0])
                .collect::<Vec<_>>();
            check(schedule.sigmas(), &floats(&case["sigmas"]), 0.0, &format!("sigmas of {case}"));
            check(&timesteps, &floats(&case["timesteps"]), 0.0, &format!("timesteps of {case}"));
        }
    }

    #[test]
    fn euler_steps_are_those_of_diffusers() {
        for case in cases() {
            let schedule = made(&case);
            let mut latents =
                Tensor::new(&[-2_f32, -4.0 / 3.0, -2.0 / 3.0, 0.0, 2.0 / 3.0, 4.0 / 3.0, 2.0], &Device::Cpu).unwrap();
            for index in 0..schedule.steps() {
                let velocity = latents.affine(0.5, -f64::from(schedule.sigmas()[index])).unwrap();
                latents = schedule.step(index, &latents, &velocity).unwrap();
            }
            check(&latents.to_vec1().unwrap(), &floats(&case["after"]), 1e-6, &format!("latents of {case}"));
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for config in [
            json!({"use_karras_sigmas": true}),
            json!({"invert_sigmas": true}),
            json!({"stochastic_sampling": true}),
            json!({"_class_name": "DDIMScheduler"}),
            json!({"time_shift_type": "cubic"}),
            json!({"shift_terminal": 1.5}),
            json!({"shift": "three"}),
            json!({"use_dynamic_shifting": true, "base_image_seq_len": 4096}),
        ] {
            let found = FlowMatchEuler::from_config(&config).unwrap_err();
            assert!(matches!(found, SamplingError::BadScheduler { .. }), "{config}: {found}");
        }
        assert!(FlowMatchEuler::default().schedule(0, 256).is_err());
    }
}
