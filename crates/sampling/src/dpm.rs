//! [`DpmSolver`]: diffusers' `DPMSolverMultistepScheduler` with algorithm "dpmsolver++", first and second order
//! (DPM-Solver++, Lu et al., arXiv 2211.01095).

use crate::config::{AcceptedKeys, bad, class};
use crate::diffusion::{BETA_SCHEDULES, DiffusionConfig, NoiseLevel, PREDICTIONS, SPACINGS, Spacing, sigma};
use crate::schedule::StepCoefficients;
use crate::{Result, Schedule};
use clearform_models::NoiseProcess;
use serde::Deserialize;
use serde_json::Value;

/// diffusers' `DPMSolverMultistepScheduler` with algorithm "dpmsolver++". Absent keys of its config have the defaults
/// of the class.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct DpmSolver {
    #[serde(flatten)]
    diffusion: DiffusionConfig,
    solver_order: usize,
    solver_type: Solver,
    lower_order_final: bool,
    euler_at_final: bool,
    final_sigmas_type: FinalSigma,
    timestep_spacing: Spacing,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Solver {
    Midpoint,
    Heun,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FinalSigma {
    Zero,
    SigmaMin,
}

/// As in diffusers, `lower_order_final` only acts below this number of steps.
const MANY_STEPS: usize = 15;

const ACCEPTED: AcceptedKeys = AcceptedKeys {
    class: class::DPM_SOLVER,
    unsupported: &[
        "lambda_min_clipped",
        "rescale_betas_zero_snr",
        "thresholding",
        "trained_betas",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_flow_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
    ],
    choices: &[
        ("algorithm_type", &["dpmsolver++"]),
        BETA_SCHEDULES,
        ("final_sigmas_type", &["zero", "sigma_min"]),
        PREDICTIONS,
        ("solver_type", &["midpoint", "heun"]),
        SPACINGS,
    ],
};

impl DpmSolver {
    /// Reads scheduler_config.json. As in diffusers, keys that the class does not have are ignored. So is
    /// `variance_type`: [`Guidance::predict`](crate::Guidance::predict) drops a learned variance wherever a prediction
    /// has one.
    ///
    /// # Errors
    /// [`crate::SamplingError::BadScheduler`] for another scheduler class, an option that is not supported, or a value
    /// of the wrong type.
    pub fn from_config(config: &Value) -> Result<Self> {
        let solver: Self = ACCEPTED.read(config)?;
        solver.diffusion.check()?;
        match solver.solver_order {
            1 | 2 => Ok(solver),
            found => Err(bad("solver_order", format!("expected 1 or 2, found {found}"))),
        }
    }

    /// `set_timesteps(steps)`, with the coefficients of each step.
    ///
    /// # Errors
    /// [`crate::SamplingError::BadSetting`] for 0 steps, or more than the training timesteps allow.
    pub fn schedule(&self, steps: usize) -> Result<Schedule> {
        let abar = self.diffusion.alphas_cumprod();
        let timesteps = self.diffusion.timesteps(self.timestep_spacing, steps, self.spare())?;
        let last = match self.final_sigmas_type {
            FinalSigma::Zero => 0.0,
            FinalSigma::SigmaMin => sigma(abar[0]),
        };
        let sigmas = timesteps.iter().map(|&timestep| sigma(abar[timestep])).chain([last]).collect::<Vec<_>>();
        let coefficients = (0..steps).map(|index| self.step(&sigmas, index)).collect();
        let timesteps = timesteps.into_iter().map(|timestep| timestep as f32).collect();
        Schedule::new(NoiseProcess::Ddpm, sigmas, timesteps, coefficients)
    }

    /// diffusers spaces one more timestep and omits the last, except with "trailing".
    fn spare(&self) -> usize {
        usize::from(self.timestep_spacing != Spacing::Trailing)
    }

    /// Algorithm 2 of the paper, DPM-Solver++(2M); first order is DDIM. `slope` is the weight of the change of x0 since
    /// the previous step.
    fn step(&self, sigmas: &[f32], index: usize) -> StepCoefficients {
        let now = NoiseLevel::from_sigma(sigmas[index]);
        let next = NoiseLevel::from_sigma(sigmas[index + 1]);
        let h = next.lambda() - now.lambda();
        let data = -next.alpha * (-h).exp_m1();
        let slope = match (self.second_order(index, sigmas.len() - 1), self.solver_type) {
            (false, _) => 0.0,
            (true, solver) => {
                let weight = match solver {
                    Solver::Midpoint => 0.5 * data,
                    Solver::Heun => next.alpha * ((-h).exp_m1() / h + 1.0),
                };
                weight * h / (now.lambda() - NoiseLevel::from_sigma(sigmas[index - 1]).lambda())
            }
        };
        StepCoefficients {
            estimate: Some(self.diffusion.prediction_type.data(now)),
            latents: next.sigma / now.sigma,
            data: data + slope,
            prediction: 0.0,
            previous: -slope,
        }
    }

    fn second_order(&self, index: usize, steps: usize) -> bool {
        let few = self.lower_order_final && steps < MANY_STEPS;
        let first_at_end = self.euler_at_final || few || self.final_sigmas_type == FinalSigma::Zero;
        self.solver_order == 2 && index > 0 && !(index + 1 == steps && first_at_end)
    }
}

impl Default for DpmSolver {
    fn default() -> Self {
        Self {
            diffusion: DiffusionConfig::default(),
            solver_order: 2,
            solver_type: Solver::Midpoint,
            lower_order_final: true,
            euler_at_final: false,
            final_sigmas_type: FinalSigma::Zero,
            timestep_spacing: Spacing::Linspace,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SamplingError;
    use serde_json::json;

    #[test]
    fn unsupported_options_are_refused_by_name() {
        for (key, value) in [
            ("use_karras_sigmas", json!(true)),
            ("use_lu_lambdas", json!(true)),
            ("use_flow_sigmas", json!(true)),
            ("lambda_min_clipped", json!(-5.1)),
            ("algorithm_type", json!("sde-dpmsolver++")),
            ("solver_type", json!("bh2")),
            ("solver_order", json!(3)),
            ("final_sigmas_type", json!("one")),
            ("prediction_type", json!("flow_prediction")),
            ("thresholding", json!(true)),
            ("_class_name", json!("DDIMScheduler")),
        ] {
            let found = DpmSolver::from_config(&json!({key: value})).unwrap_err();
            assert!(matches!(found, SamplingError::BadScheduler { key: named, .. } if named == key), "{key}: {found}");
        }
    }

    #[test]
    fn more_steps_than_training_timesteps_are_refused() {
        let heun = DpmSolver::from_config(&json!({"solver_type": "heun", "num_train_timesteps": 3}));
        for (solver, steps, part) in [
            (DpmSolver::default(), 0, "expected 1 to 999, found 0"),
            (DpmSolver::default(), 1000, "expected 1 to 999, found 1000"),
            (heun.unwrap(), 3, "expected 1 to 2, found 3"),
        ] {
            let found = solver.schedule(steps).unwrap_err().to_string();
            assert!(found.contains(part), "{found}");
        }
    }
}
