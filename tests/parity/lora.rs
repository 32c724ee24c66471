//! Every LoRA format through its plugin, compared with diffusers where it reads the format completely, and otherwise
//! with the formula in f64. fixtures/lora/export.py describes the fixtures.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::{Hints, ParameterMap};
use clearform_models::text::{ClipConfig, ClipText, T5Config, T5Encoder};
use clearform_plugin_host::{AdapterReport, LowRankMode, PatchedSource, Strength};
use clearform_runtime::{AdapterRequest, Adapters, Components, EditedTransformer, ReadOptions, TransformerCheckpoint};
use clearform_weights::{BaseWeight, Checkpoint, TensorSource as _, Weight};
use serde_json::Value;
use std::collections::BTreeMap;
use support::{assert_close, fixture, json, registry, relative_error, tensors};

const BOUND: f64 = 2e-5;

#[test]
fn every_format_is_applied_completely() {
    let cases = json("lora/cases.json");
    let expected = tensors("lora/expected.safetensors");
    let input = tensors("lora/input.safetensors");
    let mut formats = 0;
    for (format, case) in cases.as_object().unwrap() {
        if case["made_by"].is_null() {
            continue;
        }
        for mode in [LowRankMode::Separate, LowRankMode::Fused] {
            let edited = edited(&[(format, 1.0)], mode, false).unwrap();
            check_report(format, case, &edited.reports[0]);
            let mut input: BTreeMap<_, _> = input.clone().into_iter().collect();
            if let Some(wider) = expected.get(&format!("{format}/hidden_states")) {
                input.insert("hidden_states".to_owned(), wider.clone());
            }
            let sample = forward(&edited.transformer, input);
            assert_close(&sample, &expected[&format!("{format}/sample")], BOUND, &format!("{format} {mode:?}"));
        }
        formats += 1;
    }
    assert_eq!(formats, 18);
}

fn check_report(format: &str, case: &Value, report: &AdapterReport) {
    let of_text_encoders = report.skipped.keys().filter(|name| name.starts_with("lora_te")).count();
    assert_eq!((report.unmatched.len(), report.skipped.len()), (0, of_text_encoders), "{format}: {report}");
    assert_eq!(report.tensors, case["tensors"].as_u64().unwrap() as usize, "{format}");
    assert_eq!(report.applied, report.tensors - of_text_encoders, "{format}");
    if of_text_encoders == 0 {
        assert_eq!(report.modules, case["modules"].as_u64().unwrap() as usize, "{format}: {report}");
    }
}

#[test]
fn half_the_strength_is_half_the_change() {
    let expected = tensors("lora/expected.safetensors");
    let input = tensors("lora/input.safetensors");
    for format in ["peft", "kohya", "kohya_dora", "loha"] {
        let edited = edited(&[(format, 0.5)], LowRankMode::Separate, false).unwrap();
        let sample = forward(&edited.transformer, input.clone().into_iter().collect());
        assert_close(&sample, &expected[&format!("{format}@0.5/sample")], BOUND, format);
    }
}

/// Two at half strength equal one at full strength; strengths 1 and -1 cancel, except for rounding; and without an
/// adapter the prediction has exactly the bits of the base.
#[test]
fn adapters_add_up_and_none_is_the_base_bit_for_bit() {
    let expected = tensors("lora/expected.safetensors");
    let input = tensors("lora/input.safetensors");
    let run = |adapters: &[(&str, f64)]| {
        let edited = edited(adapters, LowRankMode::Separate, false).unwrap();
        forward(&edited.transformer, input.clone().into_iter().collect())
    };
    let base = run(&[]);
    assert_close(&run(&[("kohya", 0.5), ("kohya", 0.5)]), &expected["kohya/sample"], BOUND, "halves");
    assert_close(&run(&[("kohya", 1.0), ("kohya", -1.0)]), &base, BOUND, "1 and -1");
    let bits = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(bits(&run(&[])), bits(&base));
}

/// A LoRA that widens the input can be combined with one that does not, in either order.
#[test]
fn a_control_lora_can_be_combined_with_others() {
    let expected = tensors("lora/expected.safetensors");
    let run = |formats: &[(&str, f64)], mode: LowRankMode| {
        let edited = edited(formats, mode, false).unwrap();
        assert_eq!(edited.transformer.identified().size("in_channels"), Some(32));
        let mut input: BTreeMap<_, _> = tensors("lora/input.safetensors").into_iter().collect();
        input.insert("hidden_states".to_owned(), expected["bfl_control/hidden_states"].clone());
        forward(&edited.transformer, input)
    };
    let control_first = run(&[("bfl_control", 1.0), ("peft", 1.0)], LowRankMode::Separate);
    let control_last = run(&[("peft", 1.0), ("bfl_control", 1.0)], LowRankMode::Separate);
    assert_close(&control_first, &control_last, 1e-5, "order");
    let fused = run(&[("bfl_control", 1.0), ("peft", 1.0)], LowRankMode::Fused);
    assert_close(&control_first, &fused, BOUND, "fused");
    let without_peft = run(&[("bfl_control", 1.0), ("peft", 1.0), ("peft", -1.0)], LowRankMode::Separate);
    assert_close(&without_peft, &expected["bfl_control/sample"], BOUND, "peft cancelled");
    // Far above rounding: the second adapter has an effect.
    let effect = relative_error(&control_first, &expected["bfl_control/sample"]);
    assert!(effect > 0.01, "peft changes the sample by {effect:.2e}");
}

#[test]
fn a_lora_keeps_the_requested_variant() {
    let mut reading = reading();
    reading.hints.variant = Some("krea".to_owned());
    let base = TransformerCheckpoint::open(&fixture("flux/head24/weights.safetensors"), &reading).unwrap();
    let adapters = Adapters::open(&[request("peft", Strength::default())], &registry()).unwrap();
    let edited = adapters.apply_to(base, None, &reading.manifests).unwrap();
    assert_eq!(edited.transformer.identified().variant.name, "krea");
}

#[test]
fn blocks_can_have_their_own_strengths() {
    let expected = tensors("lora/expected.safetensors");
    let input = tensors("lora/input.safetensors");
    let run = |overall: f64, blocks: &[(&str, f64)]| {
        let blocks = blocks.iter().map(|(text, factor)| ((*text).to_owned(), *factor)).collect();
        let edited = open(&[request("kohya", Strength { overall, blocks })], LowRankMode::Separate, false).unwrap();
        forward(&edited.transformer, input.clone().into_iter().collect())
    };
    let blocks: Vec<(&str, f64)> =
        ["double_blocks", "single_blocks", "time_in", "vector_in", "guidance_in", "txt_in", "img_in", "final_layer"]
            .map(|name| (name, 1.0))
            .into();
    assert_close(&run(0.5, &blocks), &expected["kohya/sample"], BOUND, "blocks of full strength");
    let error = open(
        &[request("kohya", Strength { overall: 1.0, blocks: vec![("doble".to_owned(), 0.0)] })],
        LowRankMode::Separate,
        false,
    );
    let error = error.err().unwrap();
    assert!(
        error.contains("the strength for \"doble\" has no effect: no edited parameter has this in its name"),
        "{error}"
    );
}

#[test]
fn unmatched_tensors_are_an_error_that_names_them_unless_allowed() {
    let error = edited(&[("broken", 1.0)], LowRankMode::Separate, false).err().unwrap();
    for part in [
        "double_blocks_9_img_attn_qkv",
        "the adapter was made for another model",
        "\"totally.unknown\"",
        "--allow-partial",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let edited = edited(&[("broken", 1.0)], LowRankMode::Separate, true).unwrap();
    let report = &edited.reports[0];
    assert_eq!((report.tensors, report.applied, report.modules, report.unmatched.len()), (13, 6, 2, 7), "{report}");
}

#[test]
fn text_encoders_are_edited_too() {
    let folder = fixture("components/generation4");
    let components = Components::new(&folder, None);
    let edited = {
        let adapters = Adapters::open(&[request("kohya_te", Strength::default())], &registry()).unwrap();
        adapters.apply_to(base(), Some(&components), &reading().manifests).unwrap()
    };
    let report = &edited.reports[0];
    assert_eq!((report.applied, report.modules), (57, 19), "{report}");
    let expected = tensors("lora/expected.safetensors");
    let component = |name: &str| Checkpoint::open(folder.join(name)).unwrap();
    let ids = |name: &str| {
        tensors(&format!("components/generation4/{name}/expected.safetensors"))["ids"].narrow(0, 0, 1).unwrap()
    };
    let config = |name: &str| json(&format!("components/generation4/{name}/config.json"));

    let fused = LowRankMode::Fused;
    let clip = PatchedSource::new(component("text_encoder"), edited.edits.clone(), "text_encoder", fused);
    let clip = ClipText::build(ClipConfig::new(&config("text_encoder")).unwrap(), &clip).unwrap();
    assert_close(&clip.encode(&ids("text_encoder")).unwrap().pooled, &expected["kohya_te/pooled"], BOUND, "CLIP");
    for mode in [LowRankMode::Fused, LowRankMode::Separate] {
        let t5 = PatchedSource::new(component("text_encoder_2"), edited.edits.clone(), "text_encoder_2", mode);
        let t5 = T5Encoder::build(T5Config::new(&config("text_encoder_2")).unwrap(), &t5).unwrap();
        let hidden = t5.encode(&ids("text_encoder_2"), None).unwrap();
        assert_close(&hidden, &expected["kohya_te/hidden"], BOUND, &format!("T5, {mode:?}"));
    }
}

/// A converted model contains the same weights that a LoRA at run time computes with.
#[test]
fn a_patched_source_writes_the_weights_that_it_computes_with() {
    let edited = edited(&[("peft", 1.0)], LowRankMode::Separate, false).unwrap();
    let source = edited.transformer.source();
    let name = "transformer_blocks.0.attn.to_q.weight";
    let written = source.read(name).unwrap().to_tensor(name).unwrap();
    let computed = source.tensor(name).unwrap();
    assert_close(&written, &computed, 0.0, name);
    let Weight { base: BaseWeight::Dense(base), low_rank: terms, .. } = source.weight(name).unwrap() else {
        panic!("{name}")
    };
    assert_eq!(terms.len(), 1);
    let product =
        (terms[0].up.to_dtype(DType::F32).unwrap().matmul(&terms[0].down.to_dtype(DType::F32).unwrap()).unwrap()
            * terms[0].scale)
            .unwrap();
    let whole = (base.to_dtype(DType::F32).unwrap() + product).unwrap();
    assert_close(&computed.to_dtype(DType::F32).unwrap(), &whole, 5e-3, "to bf16");
}

fn edited(adapters: &[(&str, f64)], mode: LowRankMode, allow_partial: bool) -> Result<EditedTransformer, String> {
    let request = |(format, overall): &(&str, f64)| request(format, Strength { overall: *overall, blocks: Vec::new() });
    open(&adapters.iter().map(request).collect::<Vec<_>>(), mode, allow_partial)
}

fn open(requests: &[AdapterRequest], mode: LowRankMode, allow_partial: bool) -> Result<EditedTransformer, String> {
    let mut adapters = Adapters::open(requests, &registry()).unwrap();
    adapters.low_rank = mode;
    adapters.allow_partial = allow_partial;
    adapters.apply_to(base(), None, &reading().manifests).map_err(|error| error.to_string())
}

fn request(format: &str, strength: Strength) -> AdapterRequest {
    AdapterRequest { path: fixture(&format!("lora/{format}.safetensors")), strength, ..AdapterRequest::default() }
}

fn base() -> TransformerCheckpoint {
    TransformerCheckpoint::open(&fixture("flux/head24/weights.safetensors"), &reading()).unwrap()
}

fn reading() -> ReadOptions {
    let hints = Hints { config: Some(json("flux/head24/config.json")), ..Hints::default() };
    ReadOptions { hints, ..ReadOptions::default_options().unwrap() }
}

fn forward(transformer: &TransformerCheckpoint, input: BTreeMap<String, Tensor>) -> Tensor {
    let denoiser = transformer.build(&AttentionPlan::full(), Some(DType::F32), &Device::Cpu).unwrap();
    denoiser.forward(&transformer.architecture().parse_input(input).unwrap()).unwrap()
}

/// A component with one layout: names with and without a prefix, with dots or underscores.
#[test]
fn the_prefix_of_a_name_is_optional() {
    let component = Checkpoint::open(fixture("components/generation4/text_encoder")).unwrap();
    let parameters = ParameterMap::of_tensors(&component.tensors(), "text_model.");
    let name = "encoder.layers.0.self_attn.q_proj.weight";
    for name in [name.to_owned(), format!("text_model.{name}"), name.replace('.', "_")] {
        let found = parameters.find(&name).unwrap_or_else(|| panic!("{name} is not found"));
        assert_eq!(found.name, "text_model.encoder.layers.0.self_attn.q_proj.weight", "{name}");
    }
}
