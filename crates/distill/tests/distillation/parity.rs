//! Three steps compared with those of PyTorch, which tests/fixtures/distill/export.py exports.

use crate::support::{batch, models, steps, with_prefix};
use candle_core::{DType, Device, Tensor, Var};
use clearform_distill::{Activations, LossSettings, Losses, Optimizer, OptimizerState, backward};
use clearform_testkit::{assert_close, relative_error};
use std::collections::BTreeMap;

const LOSS: LossSettings = LossSettings { denoising: 1.0, prediction: 0.5, attention: 0.5, every: 2, layers: None };

fn assert_losses(what: &str, losses: Losses, wanted: &Tensor) {
    let got = [losses.denoising, losses.prediction, losses.attention, losses.total].map(|loss| loss as f32);
    for (index, (got, wanted)) in got.into_iter().zip(wanted.to_vec1::<f32>().unwrap()).enumerate() {
        assert!((got - wanted).abs() <= 1e-4 * wanted, "{what}, loss {index}: {got}, wanted {wanted}");
    }
}

#[test]
fn losses_gradients_and_plain_steps_are_those_of_torch() {
    let steps = steps();
    let models = models("clear:r=2", DType::F32);
    let start = models.snapshot().unwrap();
    let mut optimizer = OptimizerState::default();
    for step in 0..3 {
        let (losses, gradients) = backward(&models, &batch(&steps, step), &LOSS, Activations::Recompute).unwrap();
        assert_losses(&format!("step {step}"), losses, &steps[&format!("{step}/losses")]);
        let wanted = with_prefix(&steps, &format!("{step}/gradient/"));
        assert_eq!(gradients.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        for (name, wanted) in &wanted {
            assert_close(&format!("step {step}, gradient of {name}"), &gradients[name], wanted, 1e-4);
        }
        optimizer.step(Optimizer::Sgd, 0.02, models.masters(), &gradients).unwrap();
    }
    for (name, wanted) in with_prefix(&steps, "sgd/") {
        let got = models.masters()[&name].as_tensor();
        assert_close(&name, got, &wanted, 1e-5);
        let moved = relative_error(&start[&name], &wanted).unwrap();
        assert!(moved > 1e-4, "{name} moved by {moved:.1e}: a lost step would hardly be seen");
    }
}

#[test]
fn pooled_context_learns_as_in_torch() {
    let steps = steps();
    let models = models("clear:r=2,d=2", DType::F32);
    let (losses, gradients) = backward(&models, &batch(&steps, 0), &LOSS, Activations::Recompute).unwrap();
    assert_losses("pooled", losses, &steps["pooled/losses"]);
    let wanted = with_prefix(&steps, "pooled/gradient/");
    assert_eq!(wanted.len(), 4);
    for (name, wanted) in &wanted {
        assert_close(name, &gradients[name], wanted, 1e-4);
    }
}

#[test]
fn adamw_and_its_state_are_those_of_torch() {
    let steps = steps();
    let wanted = with_prefix(&steps, "adamw/weight/");
    let start = models("clear:r=2", DType::F32).snapshot().unwrap();
    let master = |name: &String| (name.clone(), Var::from_tensor(&start[name]).unwrap());
    let masters: BTreeMap<String, Var> = wanted.keys().map(master).collect();
    let adamw = Optimizer::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
    let mut state = OptimizerState::default();
    for step in 0..3 {
        let given = with_prefix(&steps, &format!("{step}/gradient/"));
        let given = given.into_iter().filter(|(name, _)| masters.contains_key(name)).collect();
        state.step(adamw, 1e-3, &masters, &given).unwrap();
    }
    assert_eq!(masters.len(), 2);
    for (name, wanted) in &wanted {
        assert!(relative_error(&start[name], wanted).unwrap() > 1e-3);
        assert_close(name, masters[name].as_tensor(), wanted, 1e-6);
        assert_close(name, &state.first[name], &steps[&format!("adamw/first/{name}")], 1e-6);
        assert_close(name, &state.second[name], &steps[&format!("adamw/second/{name}")], 1e-6);
    }
}

/// torch scales by bound / (norm + 1e-6), and only down.
#[test]
fn clipping_is_that_of_torch() {
    let gradients = || {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        BTreeMap::from([("a".to_owned(), tensor(&[3.0, 0.0])), ("b".to_owned(), tensor(&[4.0]))])
    };
    let mut clipped = gradients();
    assert_eq!(clearform_distill::clip_gradients(&mut clipped, Some(1.0)).unwrap(), 5.0);
    let got = [clipped["a"].to_vec1::<f32>().unwrap(), clipped["b"].to_vec1::<f32>().unwrap()].concat();
    for (got, wanted) in got.into_iter().zip([0.599_999_9, 0.0, 0.799_999_84]) {
        assert!((got - wanted).abs() < 1e-7, "{got}, wanted {wanted}");
    }
    let mut kept = gradients();
    clearform_distill::clip_gradients(&mut kept, Some(5.1)).unwrap();
    assert_eq!(kept["b"].to_vec1::<f32>().unwrap(), [4.0]);
}
