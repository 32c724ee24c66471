//! ControlNets through their plugin against diffusers' FluxControlNetModel and FluxTransformer2DModel: each residual, and
//! the prediction with them, under full and CLEAR attention. fixtures/controlnet/export.py says what the fixtures are.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::Hints;
use clearform_models::{Denoiser, DenoiserInput, StepIndex};
use clearform_plugin_host::{ControlNetInput, ControlledDenoiser, Controls, Strength};
use clearform_runtime::{ActiveControlNet, AdapterRequest, Adapters, ControlNetSchedule, ReadOptions, Transformer};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use support::{assert_close, fixture, json, registry, tensors};

const BOUND: f64 = 2e-5;
/// (double, single) blocks of each net.
const NETS: [(&str, usize, usize); 4] = [("one-two", 1, 2), ("two-two", 2, 2), ("union", 2, 1), ("hint", 2, 0)];
/// Double blocks of the base.
const DOUBLE: usize = 3;

#[test]
fn residuals_are_those_of_diffusers() {
    let (input, expected) = (input(), tensors("controlnet/expected.safetensors"));
    for (net, double, single) in NETS {
        for (name, plan) in [("full", "full"), ("r3", "clear:r=3")] {
            let controlnet = &open(&[(net, 1.0)], plan).unwrap()[0].controlnet;
            let (control, mode) = (control(net), mode(net));
            let controls = Controls { control: &control, mode: mode.as_ref(), guidance: None };
            let residuals = controlnet.residuals(&input, controls).unwrap();
            assert_eq!(residuals.len(), double + single, "{net}");
            for (index, residual) in residuals.iter().enumerate() {
                let kind =
                    if index < double { format!("double/{index}") } else { format!("single/{}", index - double) };
                let want = &expected[&format!("{net}/{name}/residual/{kind}")];
                assert_close(&residual.tensor, want, BOUND, &format!("{net} {name} {kind}"));
                assert!(residual.blocks.iter().all(|block| (index < double) == (*block < DOUBLE)), "{residual:?}");
            }
        }
    }
}

#[test]
fn predictions_are_those_of_diffusers() {
    let expected = tensors("controlnet/expected.safetensors");
    for (net, ..) in NETS {
        for (name, base, controlnet) in
            [("full-full", "full", "full"), ("r3-full", "clear:r=3", "full"), ("r3-r3", "clear:r=3", "clear:r=3")]
        {
            let sample = predict(base, &open(&[(net, 1.0)], controlnet).unwrap(), StepIndex::default());
            assert_close(&sample, &expected[&format!("{net}/{name}/sample")], BOUND, &format!("{net} {name}"));
        }
    }
    let weaker = predict("full", &open(&[("one-two", 0.6)], "full").unwrap(), StepIndex::default());
    assert_close(&weaker, &expected["one-two@0.6/full-full/sample"], BOUND, "one-two at 0.6");
}

#[test]
fn a_file_in_the_names_of_xlabs_is_the_same_net() {
    let expected = tensors("controlnet/expected.safetensors");
    let sample = predict("full", &open(&[("xlabs.safetensors", 1.0)], "full").unwrap(), StepIndex::default());
    assert_close(&sample, &expected["hint/full-full/sample"], BOUND, "xlabs");
}

/// diffusers' own code for several nets cuts all of them to the shortest.
#[test]
fn nets_of_any_depth_add_up() {
    let expected = tensors("controlnet/expected.safetensors");
    let controlnets = open(&[("one-two", 0.7), ("two-two", 0.5)], "full").unwrap();
    assert_close(
        &predict("full", &controlnets, StepIndex::default()),
        &expected["multi/full-full/sample"],
        BOUND,
        "multi",
    );
}

/// Of 10 steps, those that lie wholly within the interval.
#[test]
fn a_net_acts_within_its_interval() {
    let expected = tensors("controlnet/expected.safetensors");
    let mut controlnets = open(&[("one-two", 1.0)], "full").unwrap();
    controlnets[0].schedule = ControlNetSchedule { interval: [0.2, 0.55], mode: None };
    for index in 0..10 {
        let acts = (2..=4).contains(&index);
        let want = if acts { "one-two/full-full/sample" } else { "none/full/sample" };
        let sample = predict("full", &controlnets, StepIndex { index, steps: 10 });
        assert_close(&sample, &expected[want], BOUND, &format!("step {index}"));
    }
}

#[test]
fn what_cannot_be_used_is_an_error_that_says_why() {
    let without_mode = AdapterRequest { path: net("union"), ..AdapterRequest::default() };
    let error =
        Adapters::open(&[without_mode], &registry()).unwrap().open_controlnets(&base()).unwrap_err().to_string();
    assert!(error.contains("a union of 4 modes: give ,mode=N, 0 to 3, found none"), "{error}");
    let controlnet = &open(&[("one-two", 1.0)], "full").unwrap()[0].controlnet;
    let narrow = control("one-two").narrow(2, 0, 8).unwrap();
    let error = controlnet.residuals(&input(), Controls { control: &narrow, mode: None, guidance: None }).unwrap_err();
    assert!(error.to_string().contains("expected 20 tokens of 16 channels, found [1, 20, 8]"), "{error}");
    let error = open(&[("one-two", 1.0)], "banana").unwrap_err();
    assert!(error.contains("attention \"banana\""), "{error}");
    let other = json("flux/head24/config.json");
    let reading = ReadOptions {
        hints: Hints { config: Some(other), ..Hints::default() },
        ..ReadOptions::default_options().unwrap()
    };
    let wider = Transformer::open(&fixture("flux/head24/weights.safetensors"), &reading).unwrap();
    let request = AdapterRequest { path: net("one-two"), ..AdapterRequest::default() };
    let error = Adapters::open(&[request], &registry()).unwrap().open_controlnets(&wider).unwrap_err().to_string();
    assert!(error.contains("width: the ControlNet's is 8, the model's 48: it is for another model"), "{error}");
}

fn predict(plan: &str, controlnets: &[ActiveControlNet], step_index: StepIndex) -> Tensor {
    let transformer = base();
    let plan: AttentionPlan = plan.parse().unwrap();
    let denoiser: Box<dyn Denoiser> = transformer.build(&plan, Some(DType::F32), &Device::Cpu).unwrap();
    let names = controlnets.iter().map(|schedule| schedule.controlnet.path().file_name().unwrap().to_str().unwrap());
    let controls = controlnets.iter().zip(names).map(|(schedule, net)| ControlNetInput {
        controlnet: schedule.controlnet.clone(),
        control: control(net),
        mode: mode(net),
        guidance: None,
        scale: schedule.scale,
        interval: schedule.schedule.interval,
    });
    ControlledDenoiser::new(denoiser.as_ref(), controls.collect())
        .forward(&DenoiserInput { step_index: step_index, ..input() })
        .unwrap()
}

fn open(nets: &[(&str, f64)], attention: &str) -> Result<Vec<ActiveControlNet>, String> {
    let request = |(name, scale): &(&str, f64)| AdapterRequest {
        path: net(name),
        strength: Strength { whole: *scale, blocks: Vec::new() },
        schedule: ControlNetSchedule { mode: (*name == "union").then_some(2), ..ControlNetSchedule::default() },
        ..AdapterRequest::default()
    };
    let mut adapters = Adapters::open(&nets.iter().map(request).collect::<Vec<_>>(), &registry()).unwrap();
    adapters.branch_attention = attention.to_owned();
    adapters.open_controlnets(&base()).map_err(|error| error.to_string())
}

fn net(name: &str) -> PathBuf {
    fixture(&format!("controlnet/{name}"))
}

fn base() -> Transformer {
    let hints = Hints { config: Some(json("controlnet/base/config.json")), ..Hints::default() };
    let reading = ReadOptions { hints, ..ReadOptions::default_options().unwrap() };
    Transformer::open(&fixture("controlnet/base/weights.safetensors"), &reading).unwrap()
}

fn all_inputs() -> HashMap<String, Tensor> {
    tensors("controlnet/input.safetensors")
}

fn input() -> DenoiserInput {
    let inputs: BTreeMap<_, _> = all_inputs().into_iter().filter(|(name, _)| !name.starts_with("controlnet")).collect();
    base().family().input(inputs).unwrap()
}

fn control(net: &str) -> Tensor {
    let pixels = net == "hint" || net == "xlabs.safetensors";
    match pixels {
        true => tensors("controlnet/pixels.safetensors")["controlnet_pixels"].to_dtype(DType::F32).unwrap(),
        false => all_inputs()["controlnet_cond"].clone(),
    }
}

fn mode(net: &str) -> Option<Tensor> {
    (net == "union").then(|| all_inputs()["controlnet_mode"].clone())
}
