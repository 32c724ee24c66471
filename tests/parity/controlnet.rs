//! ControlNets through their plugin, compared with diffusers' FluxControlNetModel and FluxTransformer2DModel: each
//! residual and the predictions, with full and CLEAR attention. fixtures/controlnet/export.py describes the fixtures.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::Hints;
use clearform_models::{Denoiser, DenoiserInput, StepIndex};
use clearform_plugin_host::{ControlNetInput, ControlledDenoiser, Controls, Strength};
use clearform_runtime::{
    ActiveControlNet, AdapterRequest, Adapters, ControlNetSchedule, ReadOptions, TransformerCheckpoint,
};
use serde_json::{Value, json as value};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use support::{assert_close, fixture, json, registry, tensors};

const BOUND: f64 = 2e-5;
/// ControlNets of the fixtures.
const NETS: [&str; 4] = ["one-two", "two-two", "union", "hint"];

/// Residuals of `net` in order: the name in the fixture, and the blocks of the base that it is added to. The base has 3
/// double blocks (0 to 2) and 4 single blocks (3 to 6). "hint" is a net of XLabs, whose residuals take turns.
fn residuals_of(net: &str) -> &'static [(&'static str, &'static [usize])] {
    match net {
        "one-two" => &[("double/0", &[0, 1, 2]), ("single/0", &[3, 4]), ("single/1", &[5, 6])],
        "two-two" => &[("double/0", &[0, 1]), ("double/1", &[2]), ("single/0", &[3, 4]), ("single/1", &[5, 6])],
        "union" => &[("double/0", &[0, 1]), ("double/1", &[2]), ("single/0", &[3, 4, 5, 6])],
        "hint" => &[("double/0", &[0, 2]), ("double/1", &[1])],
        other => panic!("there is no fixture {other}"),
    }
}

#[test]
fn residuals_equal_those_of_diffusers() {
    let input = input();
    let expected = tensors("controlnet/expected.safetensors");
    for net in NETS {
        for (name, plan) in [("full", "full"), ("r3", "clear:r=3")] {
            let controlnet = &open(&[(net, 1.0)], plan).unwrap()[0].controlnet;
            let control = control(net);
            let mode = mode(net);
            let controls = Controls { control: &control, mode: mode.as_ref(), guidance: None, embedded: None };
            let residuals = controlnet.residuals(&input, controls).unwrap();
            assert_eq!(residuals.len(), residuals_of(net).len(), "{net}");
            for (residual, (kind, blocks)) in residuals.iter().zip(residuals_of(net)) {
                let want = &expected[&format!("{net}/{name}/residual/{kind}")];
                assert_close(&residual.tensor, want, BOUND, &format!("{net} {name} {kind}"));
                assert_eq!(residual.blocks, *blocks, "{net} {name} {kind}");
            }
        }
    }
}

#[test]
fn predictions_equal_those_of_diffusers() {
    let expected = tensors("controlnet/expected.safetensors");
    for net in NETS {
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
fn a_file_with_the_names_of_xlabs_is_the_same_net() {
    let expected = tensors("controlnet/expected.safetensors");
    let sample = predict("full", &open(&[("xlabs.safetensors", 1.0)], "full").unwrap(), StepIndex::default());
    assert_close(&sample, &expected["hint/full-full/sample"], BOUND, "xlabs");
}

/// diffusers' FluxMultiControlNetModel truncates all nets to the shortest one, so the fixture adds the residuals
/// itself.
#[test]
fn nets_of_different_depths_add_up() {
    let expected = tensors("controlnet/expected.safetensors");
    let controlnets = open(&[("one-two", 0.7), ("two-two", 0.5)], "full").unwrap();
    assert_close(
        &predict("full", &controlnets, StepIndex::default()),
        &expected["multi/full-full/sample"],
        BOUND,
        "multi",
    );
}

/// In 10 steps, the net is active in those that are completely within the interval.
#[test]
fn a_net_is_active_within_its_interval() {
    let expected = tensors("controlnet/expected.safetensors");
    let mut controlnets = open(&[("one-two", 1.0)], "full").unwrap();
    controlnets[0].schedule = ControlNetSchedule { interval: [0.2, 0.55], mode: None };
    for index in 0..10 {
        let is_active = (2..=4).contains(&index);
        let want = if is_active { "one-two/full-full/sample" } else { "none/full/sample" };
        let sample = predict("full", &controlnets, StepIndex { index, steps: 10 });
        assert_close(&sample, &expected[want], BOUND, &format!("step {index}"));
    }
}

#[test]
fn invalid_inputs_are_errors_that_give_the_reason() {
    let without_mode = AdapterRequest { path: net("union"), ..AdapterRequest::default() };
    let opened = Adapters::open(&[without_mode], &registry()).unwrap().open_controlnets(&base()).unwrap();
    let error = opened[0].require_mode().unwrap_err().to_string();
    assert!(error.contains("a union ControlNet with 4 modes: pass ,mode=N, 0 to 3, found none"), "{error}");
    let controlnet = &open(&[("one-two", 1.0)], "full").unwrap()[0].controlnet;
    let narrow = control("one-two").narrow(2, 0, 8).unwrap();
    let controls = Controls { control: &narrow, mode: None, guidance: None, embedded: None };
    let error = controlnet.residuals(&input(), controls).unwrap_err();
    assert!(error.to_string().contains("expected 20 tokens of 16 channels, found [1, 20, 8]"), "{error}");
    let error = open(&[("one-two", 1.0)], "banana").unwrap_err();
    assert!(error.contains("attention \"banana\""), "{error}");
    let other = json("flux/head24/config.json");
    let reading = ReadOptions {
        hints: Hints { config: Some(other), ..Hints::default() },
        ..ReadOptions::default_options().unwrap()
    };
    let wider = TransformerCheckpoint::open(&fixture("flux/head24/weights.safetensors"), &reading).unwrap();
    let request = AdapterRequest { path: net("one-two"), ..AdapterRequest::default() };
    let error = Adapters::open(&[request], &registry()).unwrap().open_controlnets(&wider).unwrap_err().to_string();
    assert!(
        error.contains("width: expected 48 as in the model, found 8: the ControlNet is for another model"),
        "{error}"
    );
}

/// Another value of a setting is refused, and a setting that is not understood is named.
#[test]
fn no_key_of_a_config_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let changed = |net: &str, key: &str, value: Value| {
        let mut config = json(&format!("controlnet/{net}/config.json"));
        config[key] = value;
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let weights = "diffusion_pytorch_model.safetensors";
        std::fs::copy(fixture(&format!("controlnet/{net}")).join(weights), folder.path().join(weights)).unwrap();
        let schedule = ControlNetSchedule::default();
        let request = AdapterRequest { path: folder.path().to_owned(), schedule, ..AdapterRequest::default() };
        Adapters::open(&[request], &registry()).unwrap().open_controlnets(&base()).map_err(|error| error.to_string())
    };
    for (net, key, value, expected) in [
        ("union", "num_mode", value!(5), "\"num_mode\" is 5 in config.json, 4 from"),
        ("one-two", "num_mode", value!(4), "controlnet_mode_embedder.weight\" is missing"),
        ("hint", "conditioning_embedding_channels", value!(5), "is 5 in config.json, 4 from"),
        ("hint", "patch_size", value!(1), "patch_size: expected 2 for a ControlNet that takes pixels, found 1"),
        ("one-two", "guidance_embeds", value!(false), "\"guidance_embeds\" is false in config.json, true from"),
    ] {
        let error = changed(net, key, value).unwrap_err();
        assert!(error.contains(expected), "{net} {key}: {error}");
    }
    assert_eq!(changed("one-two", "patch_size", value!(1)).unwrap()[0].controlnet.notes(), Vec::<String>::new());
    let notes = changed("one-two", "theta", value!(1e4)).unwrap()[0].controlnet.notes();
    assert!(notes.len() == 1 && notes[0].contains("the key \"theta\" is not understood and not used"), "{notes:?}");
}

fn predict(plan: &str, controlnets: &[ActiveControlNet], step_index: StepIndex) -> Tensor {
    let transformer = base();
    let plan: AttentionPlan = plan.parse().unwrap();
    let denoiser: Box<dyn Denoiser> = transformer.build(&plan, Some(DType::F32), &Device::Cpu).unwrap();
    let names = controlnets.iter().map(|active| active.controlnet.path().file_name().unwrap().to_str().unwrap());
    let controls = controlnets.iter().zip(names).map(|(active, net)| ControlNetInput {
        controlnet: active.controlnet.clone(),
        control: control(net),
        mode: mode(net),
        guidance: None,
        scale: active.scale,
        interval: active.schedule.interval,
    });
    ControlledDenoiser::new(denoiser.as_ref(), controls.collect())
        .forward(&DenoiserInput { step_index, ..input() })
        .unwrap()
}

fn open(nets: &[(&str, f64)], attention: &str) -> Result<Vec<ActiveControlNet>, String> {
    let request = |(name, scale): &(&str, f64)| AdapterRequest {
        path: net(name),
        strength: Strength { overall: *scale, blocks: Vec::new() },
        schedule: ControlNetSchedule { mode: (*name == "union").then_some(2), ..ControlNetSchedule::default() },
        ..AdapterRequest::default()
    };
    let mut adapters = Adapters::open(&nets.iter().map(request).collect::<Vec<_>>(), &registry()).unwrap();
    adapters.controlnet_attention = attention.to_owned();
    adapters.open_controlnets(&base()).map_err(|error| error.to_string())
}

fn net(name: &str) -> PathBuf {
    fixture(&format!("controlnet/{name}"))
}

fn base() -> TransformerCheckpoint {
    let hints = Hints { config: Some(json("controlnet/base/config.json")), ..Hints::default() };
    let reading = ReadOptions { hints, ..ReadOptions::default_options().unwrap() };
    TransformerCheckpoint::open(&fixture("controlnet/base/weights.safetensors"), &reading).unwrap()
}

fn all_inputs() -> HashMap<String, Tensor> {
    tensors("controlnet/input.safetensors")
}

fn input() -> DenoiserInput {
    let inputs: BTreeMap<_, _> = all_inputs().into_iter().filter(|(name, _)| !name.starts_with("controlnet")).collect();
    base().architecture().parse_input(inputs).unwrap()
}

fn control(net: &str) -> Tensor {
    let takes_pixels = net == "hint" || net == "xlabs.safetensors";
    match takes_pixels {
        true => tensors("controlnet/pixels.safetensors")["controlnet_pixels"].to_dtype(DType::F32).unwrap(),
        false => all_inputs()["controlnet_cond"].clone(),
    }
}

fn mode(net: &str) -> Option<Tensor> {
    (net == "union").then(|| all_inputs()["controlnet_mode"].clone())
}
