//! Whole trajectories of each scheduler, compared with diffusers 0.42.1 for the same predictions (fixtures/export.py).
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use clearform_models::StepSpacing;
use clearform_sampling::{Scheduler, SolverState};
use serde_json::{Value, json};

const BOUND: f32 = 1e-5;

fn fixture() -> Value {
    serde_json::from_str(include_str!("../fixtures/trajectories.json")).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

fn prediction(latents: &Tensor, index: usize) -> Tensor {
    let pattern = (0..7).map(|element| (((7 * element + 3 * index) % 11) as f32 - 5.0) / 4.0).collect::<Vec<_>>();
    ((latents * 0.5).unwrap() + Tensor::new(pattern, &Device::Cpu).unwrap()).unwrap()
}

fn check(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= BOUND * largest, "{what}: {got} instead of {want}, largest {largest}");
    }
}

fn check_trajectory(case: &Value) {
    let what = format!("{} steps of {}", case["steps"], case["config"]);
    let steps = case["steps"].as_u64().unwrap() as usize;
    let scheduler = Scheduler::from_config(&case["config"]).unwrap().spaced(StepSpacing::Trained);
    let schedule = scheduler.schedule(steps, 1024).unwrap();
    assert_eq!(schedule.steps(), steps, "{what}");
    let from = [-2_f32, -4.0 / 3.0, -2.0 / 3.0, 0.0, 2.0 / 3.0, 4.0 / 3.0, 2.0];
    let mut latents = Tensor::new(&from, &Device::Cpu).unwrap();
    let mut history = SolverState::default();
    let mut compared = 0;
    for index in 0..steps {
        let prediction = prediction(&latents, index);
        latents = schedule.step(index, &latents, &prediction, &mut history).unwrap();
        if let Some(want) = case["after"].get(index.to_string()) {
            check(&latents.to_vec1().unwrap(), &floats(want), &format!("{what}, after step {index}"));
            compared += 1;
        }
    }
    assert_eq!(compared, case["after"].as_object().unwrap().len(), "{what}");
}

#[test]
fn trajectories_match_diffusers() {
    for case in fixture()["trajectories"].as_array().unwrap() {
        check_trajectory(case);
    }
}

#[test]
fn timesteps_and_sigmas_match_diffusers() {
    for case in fixture()["trajectories"].as_array().unwrap() {
        let what = case["config"].to_string();
        let steps = case["steps"].as_u64().unwrap() as usize;
        let scheduler = Scheduler::from_config(&case["config"]).unwrap().spaced(StepSpacing::Trained);
        let schedule = scheduler.schedule(steps, 1024).unwrap();
        let latents = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap();
        let scale = if matches!(scheduler, Scheduler::FlowMatchEuler(_)) { 1000.0 } else { 1.0 };
        let timestep = |index| schedule.timestep(index, &latents).unwrap().to_vec1::<f32>().unwrap()[0] * scale;
        check(&(0..steps).map(timestep).collect::<Vec<_>>(), &floats(&case["timesteps"]), &what);
        if let Some(sigmas) = case.get("sigmas") {
            check(schedule.sigmas(), &floats(sigmas), &what);
        }
        assert!(schedule.sigmas().windows(2).all(|pair| pair[1] < pair[0]), "{what}");
    }
}

/// abar is 4.0358e-5 at timestep 999 and 0.9999 at timestep 0, from diffusers' `alphas_cumprod`.
#[test]
fn sigmas_of_ddim_are_noise_over_signal() {
    for (set_alpha_to_one, last) in [(true, 0.0), (false, 0.010_000_5)] {
        let config = json!({
            "_class_name": "DDIMScheduler",
            "timestep_spacing": "linspace",
            "set_alpha_to_one": set_alpha_to_one,
        });
        let schedule = Scheduler::from_config(&config).unwrap().schedule(2, 0).unwrap();
        let want = [157.407_26_f32, 0.010_000_5, last];
        assert_eq!(schedule.sigmas().len(), want.len());
        for (got, want) in schedule.sigmas().iter().zip(want) {
            assert!((got - want).abs() <= 3e-6 * want.max(1.0), "{got} instead of {want}");
        }
    }
}

#[test]
fn timesteps_match_diffusers_for_every_number_of_steps() {
    for case in fixture()["spacings"].as_array().unwrap() {
        let config = json!({"_class_name": case["class"], "timestep_spacing": case["spacing"]});
        let scheduler = Scheduler::from_config(&config).unwrap();
        let latents = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap();
        for (index, want) in case["sums"].as_array().unwrap().iter().enumerate() {
            let schedule = scheduler.schedule(index + 1, 0).unwrap();
            let timestep = |step| schedule.timestep(step, &latents).unwrap().to_vec1::<f32>().unwrap()[0];
            let sum = (0..=index).map(|step| (step + 1) as u64 * timestep(step) as u64).sum::<u64>();
            assert_eq!(sum, want.as_u64().unwrap(), "{} steps of {config}", index + 1);
        }
    }
}
