//! Every LoRA format through its plugin, against diffusers where it reads the format whole, and else against the formula
//! in f64. fixtures/lora/export.py says what the fixtures are.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::{Hints, ParameterMap};
use clearform_models::text::{ClipConfig, ClipText, T5Config, T5Encoder};
use clearform_plugin_host::{AdapterReport, LowRankMode, PatchedSource, Strength, WeightEdits};
use clearform_runtime::{AdapterRequest, Adapters, Components, EditedTransformer, ReadOptions, Transformer};
use clearform_weights::{Checkpoint, TensorSource as _};
use serde_json::Value;
use std::collections::BTreeMap;
use support::{assert_close, fixture, json, registry, tensors};

const BOUND: f64 = 2e-5;

#[test]
fn every_format_is_applied_in_full() {
    let (cases, expected, input) =
        (json("lora/cases.json"), tensors("lora/expected.safetensors"), tensors("lora/input.safetensors"));
    let mut formats = 0;
    for (format, case) in cases.as_object().unwrap() {
        if case["made_by"].is_null() {
            continue;
        }
        for mode in [LowRankMode::Beside, LowRankMode::Fused] {
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
    let of_text = report.skipped.keys().filter(|name| name.starts_with("lora_te")).count();
    assert_eq!((report.unmatched.len(), report.skipped.len()), (0, of_text), "{format}: {report}");
    assert_eq!(report.tensors, case["tensors"].as_u64().unwrap() as usize, "{format}");
    assert_eq!(report.applied, report.tensors - of_text, "{format}");
    if of_text == 0 {
        assert_eq!(report.modules, case["modules"].as_u64().unwrap() as usize, "{format}: {report}");
    }
}

#[test]
fn half_the_strength_is_half_the_way() {
    let (expected, input) = (tensors("lora/expected.safetensors"), tensors("lora/input.safetensors"));
    for format in ["peft", "kohya", "kohya_dora", "loha"] {
        let edited = edited(&[(format, 0.5)], LowRankMode::Beside, false).unwrap();
        let sample = forward(&edited.transformer, input.clone().into_iter().collect());
        assert_close(&sample, &expected[&format!("{format}@0.5/sample")], BOUND, format);
    }
}

/// Two at half strength are one at full; one at strength 1 and the same at -1 are none, but for rounding; and without
/// any the very bits of the base come back.
#[test]
fn several_add_up_and_none_is_the_base_bit_for_bit() {
    let (expected, input) = (tensors("lora/expected.safetensors"), tensors("lora/input.safetensors"));
    let run = |adapters: &[(&str, f64)]| {
        let edited = edited(adapters, LowRankMode::Beside, false).unwrap();
        forward(&edited.transformer, input.clone().into_iter().collect())
    };
    let base = run(&[]);
    assert_close(&run(&[("kohya", 0.5), ("kohya", 0.5)]), &expected["kohya/sample"], BOUND, "halves");
    assert_close(&run(&[("kohya", 1.0), ("kohya", -1.0)]), &base, BOUND, "forth and back");
    let bits = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(bits(&run(&[])), bits(&base));
}

/// One that widens the input goes with one that does not, whichever comes first.
#[test]
fn a_control_lora_goes_with_others() {
    let wider = tensors("lora/expected.safetensors")["bfl_control/hidden_states"].clone();
    let run = |formats: [(&str, f64); 2]| {
        let edited = edited(&formats, LowRankMode::Beside, false).unwrap();
        assert_eq!(edited.transformer.identified().size("in_channels"), Some(32));
        let mut input: BTreeMap<_, _> = tensors("lora/input.safetensors").into_iter().collect();
        input.insert("hidden_states".to_owned(), wider.clone());
        forward(&edited.transformer, input)
    };
    let (first, last) = (run([("bfl_control", 1.0), ("peft", 1.0)]), run([("peft", 1.0), ("bfl_control", 1.0)]));
    assert_close(&first, &last, 1e-5, "order");
}

#[test]
fn a_lora_leaves_the_variant_that_was_asked_for() {
    let mut reading = reading();
    reading.hints.variant = Some("krea".to_owned());
    let base = Transformer::open(&fixture("flux/head24/weights.safetensors"), &reading).unwrap();
    let adapters = Adapters::open(&[request("peft", Strength::default())], &registry()).unwrap();
    let edited = adapters.apply_to(base, None, &reading.manifests).unwrap();
    assert_eq!(edited.transformer.identified().variant.name, "krea");
}

#[test]
fn blocks_have_strengths_of_their_own() {
    let (expected, input) = (tensors("lora/expected.safetensors"), tensors("lora/input.safetensors"));
    let run = |whole: f64, blocks: &[(&str, f64)]| {
        let blocks = blocks.iter().map(|(text, factor)| ((*text).to_owned(), *factor)).collect();
        let edited = open(&[request("kohya", Strength { whole, blocks })], LowRankMode::Beside, false).unwrap();
        forward(&edited.transformer, input.clone().into_iter().collect())
    };
    let blocks: Vec<(&str, f64)> =
        ["double_blocks", "single_blocks", "time_in", "vector_in", "guidance_in", "txt_in", "img_in", "final_layer"]
            .map(|name| (name, 2.0))
            .into();
    assert_close(&run(0.5, &blocks), &expected["kohya/sample"], BOUND, "halved and doubled");
    let error = open(
        &[request("kohya", Strength { whole: 1.0, blocks: vec![("doble".to_owned(), 0.0)] })],
        LowRankMode::Beside,
        false,
    );
    assert!(error.err().unwrap().contains("\"doble\", which no edited parameter is called"));
}

#[test]
fn what_meets_nothing_is_an_error_that_names_it_unless_allowed() {
    let error = edited(&[("broken", 1.0)], LowRankMode::Beside, false).err().unwrap();
    for part in
        ["double_blocks_9_img_attn_qkv", "it was made for another model", "\"totally.unknown\"", "--allow-partial"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    let edited = edited(&[("broken", 1.0)], LowRankMode::Beside, true).unwrap();
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
    let part = |name: &str| Checkpoint::open(folder.join(name)).unwrap();
    let ids = |name: &str| {
        tensors(&format!("components/generation4/{name}/expected.safetensors"))["ids"].narrow(0, 0, 1).unwrap()
    };
    let config = |name: &str| json(&format!("components/generation4/{name}/config.json"));

    let clip = adapted(part("text_encoder"), &edited.edits, "text_encoder");
    let clip = ClipText::build(ClipConfig::new(&config("text_encoder")).unwrap(), &clip).unwrap();
    assert_close(&clip.encode(&ids("text_encoder")).unwrap().pooled, &expected["kohya_te/pooled"], BOUND, "CLIP");
    let t5 = adapted(part("text_encoder_2"), &edited.edits, "text_encoder_2");
    let t5 = T5Encoder::build(T5Config::new(&config("text_encoder_2")).unwrap(), &t5).unwrap();
    assert_close(&t5.encode(&ids("text_encoder_2")).unwrap(), &expected["kohya_te/hidden"], BOUND, "T5");
}

fn adapted<'a>(part: Checkpoint, edits: &'a WeightEdits, name: &str) -> PatchedSource<'a, Box<Checkpoint>> {
    PatchedSource::new(Box::new(part), edits, name, LowRankMode::Fused)
}

/// What a converted model holds is what a LoRA at run time computes with.
#[test]
fn a_fused_source_writes_what_it_computes_with() {
    let edited = edited(&[("peft", 1.0)], LowRankMode::Beside, false).unwrap();
    let source = edited.transformer.source();
    let name = "transformer_blocks.0.attn.to_q.weight";
    let (written, computed) = (source.read(name).unwrap().to_tensor(name).unwrap(), source.tensor(name).unwrap());
    assert_close(&written, &computed, 0.0, name);
    let (weight, terms) = source.low_rank_terms(name).unwrap();
    assert_eq!(terms.len(), 1);
    let product =
        (terms[0].up.to_dtype(DType::F32).unwrap().matmul(&terms[0].down.to_dtype(DType::F32).unwrap()).unwrap()
            * terms[0].scale)
            .unwrap();
    let whole = (weight.to_dtype(DType::F32).unwrap() + product).unwrap();
    assert_close(&computed.to_dtype(DType::F32).unwrap(), &whole, 5e-3, "to bf16");
}

fn edited(adapters: &[(&str, f64)], mode: LowRankMode, allow_partial: bool) -> Result<EditedTransformer, String> {
    let request = |(format, whole): &(&str, f64)| request(format, Strength { whole: *whole, blocks: Vec::new() });
    open(&adapters.iter().map(request).collect::<Vec<_>>(), mode, allow_partial)
}

fn open(requests: &[AdapterRequest], mode: LowRankMode, allow_partial: bool) -> Result<EditedTransformer, String> {
    let mut adapters = Adapters::open(requests, &registry()).unwrap();
    (adapters.low_rank, adapters.allow_partial) = (mode, allow_partial);
    adapters.apply_to(base(), None, &reading().manifests).map_err(|error| error.to_string())
}

fn request(format: &str, strength: Strength) -> AdapterRequest {
    AdapterRequest { path: fixture(&format!("lora/{format}.safetensors")), strength, ..AdapterRequest::default() }
}

fn base() -> Transformer {
    Transformer::open(&fixture("flux/head24/weights.safetensors"), &reading()).unwrap()
}

fn reading() -> ReadOptions {
    let hints = Hints { config: Some(json("flux/head24/config.json")), ..Hints::default() };
    ReadOptions { hints, ..ReadOptions::default_options().unwrap() }
}

fn forward(transformer: &Transformer, input: BTreeMap<String, Tensor>) -> Tensor {
    let denoiser = transformer.build(&AttentionPlan::full(), Some(DType::F32), &Device::Cpu).unwrap();
    denoiser.forward(&transformer.family().input(input).unwrap()).unwrap()
}

/// Addresses of a part with one layout: names with and without a prefix, with dots or underscores.
#[test]
fn a_prefix_may_stand_before_a_name_or_not() {
    let part = Checkpoint::open(fixture("components/generation4/text_encoder")).unwrap();
    let addresses = ParameterMap::of_tensors(&part.tensors(), "text_model.");
    let name = "encoder.layers.0.self_attn.q_proj.weight";
    for name in [name.to_owned(), format!("text_model.{name}"), name.replace('.', "_")] {
        assert!(addresses.find(&name).is_some(), "{name}");
    }
}
