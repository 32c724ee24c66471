//! Models with a history: what was distilled before, by whom samples were drawn, and what an owner may change.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{Tiny, copy_folder, json, repository, run, stderr_of, text};
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// As little as a distillation takes.
const SHORT: [&str; 8] = ["--sample-count", "2", "--sample-steps", "2", "--held-out", "2", "--steps", "2"];

fn record(model: &Path) -> toml::Table {
    fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap()
}

#[test]
fn the_pages_of_a_model_are_its_owners() {
    let folder = tempfile::tempdir().unwrap();
    let [model, image] = ["model", "out.png"].map(|name| folder.path().join(name));
    let base = repository("assets/mini-dit/model");
    run(0, &[&["convert", text(&base), "-o", text(&model), "--radius", "4"], &SHORT[..]].concat());
    let card = fs::read_to_string(model.join("README.md")).unwrap();
    fs::write(model.join("README.md"), card.replace("tags:", "license: mit\ntags:")).unwrap();
    fs::remove_file(model.join("distillation.html")).unwrap();
    run(0, &["generate", text(&model), "--class", "3", "--steps", "1", "-o", text(&image)]);
    run(0, &["inspect", text(&model)]);
    let report = json(1, &["verify", text(&model)]);
    assert_eq!((&report["changed"][0], &report["missing"][0]), (&"README.md".into(), &"distillation.html".into()));
}

#[test]
fn a_further_training_that_does_harm_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let [model, worse] = ["model", "worse"].map(|name| folder.path().join(name));
    let base = repository("assets/mini-dit/model");
    run(0, &[&["convert", text(&base), "-o", text(&model), "--radius", "6", "--steps", "40"], &SHORT[..6]].concat());
    let distill = ["distill", text(&model), "--teacher", text(&base), "-o", text(&worse), "--lr", "0.05"];
    let said = stderr_of(0, &[&distill[..], &SHORT].concat());
    assert!(said.contains("this training made the student worse: its error was"), "{said}");
}

/// Weights that were distilled for a radius stay those for it, whatever plan a copy is written with.
#[test]
fn what_weights_were_distilled_for_is_not_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let [model, kept, other, image] = ["model", "kept", "other", "out.png"].map(|name| folder.path().join(name));
    let base = repository("assets/mini-dit/model");
    run(0, &[&["convert", text(&base), "-o", text(&model), "--radius", "4"], &SHORT[..]].concat());
    run(0, &["convert", text(&model), "-o", text(&kept), "--no-distill"]);
    assert_eq!(record(&kept)["attention"]["default"].as_str(), Some("clear:r=4"));
    run(0, &["convert", text(&model), "-o", text(&other), "--no-distill", "--radius", "6"]);
    let generate = ["generate", text(&other), "--class", "3", "--steps", "1", "-o", text(&image), "--overwrite"];
    let said = stderr_of(0, &generate);
    assert!(said.contains("weights are those for attention clear:r=4; it was not distilled for clear:r=6"), "{said}");
    let said = stderr_of(0, &[&generate[..], &["--attention", "clear:r=4"]].concat());
    assert_eq!(said, "");
    let card = fs::read_to_string(other.join("README.md")).unwrap();
    assert!(card.contains("It was distilled for `clear:r=4`"), "{card}");
}

#[test]
fn a_student_is_judged_on_samples_of_its_own_teacher() {
    let folder = tempfile::tempdir().unwrap();
    let [changed, samples] = ["changed", "samples"].map(|name| folder.path().join(name));
    let base = repository("assets/mini-dit/model");
    copy_folder(&base, &changed);
    let weights = changed.join("model.safetensors");
    let mut tensors: HashMap<String, Tensor> = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap();
    let name = "final_layer.linear.bias";
    tensors.insert(name.to_owned(), (tensors[name].to_dtype(DType::F32).unwrap() + 0.01).unwrap());
    candle_core::safetensors::save(&tensors, &weights).unwrap();
    let convert = |source: &Path, name: &str| {
        let output = folder.path().join(name);
        let arguments = ["convert", text(source), "-o", text(&output), "--radius", "4", "--samples", text(&samples)];
        stderr_of(0, &[&arguments[..], &SHORT].concat())
    };
    convert(&base, "first");
    let said = convert(&changed, "second");
    assert!(said.contains("judged on samples of its own teacher"), "{said}");
    let sets = fs::read_dir(&samples).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(sets.filter(|name| name.starts_with("held-out-2")).count(), 2);
}

/// What is merged is rounded once, to what is written.
#[test]
fn a_lora_is_merged_in_the_dtype_that_is_written() {
    let (mut tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let [model, lora] = ["model", "lora.safetensors"].map(|name| folder.path().join(name));
    let name = "proj_out.weight";
    let stored = tiny.tensors[name].to_dtype(DType::BF16).unwrap();
    tiny.tensors.insert(name.to_owned(), stored.clone());
    tiny.save();
    let factor = |rows, columns| Tensor::full(0.01f32, (rows, columns), &Device::Cpu).unwrap();
    let [down, up] = [factor(1, 48), factor(16, 1)];
    let factors = [("proj_out.lora_A.weight", down.clone()), ("proj_out.lora_B.weight", up.clone())];
    candle_core::safetensors::save(&HashMap::from(factors), &lora).unwrap();
    let convert = ["convert", text(tiny.path()), "-o", text(&model), "--attention", "full", "--no-distill"];
    run(0, &[&convert[..], &["--dtype", "f32", "--lora", text(&lora)]].concat());
    let written = model.join("transformer/diffusion_pytorch_model.safetensors");
    let merged = candle_core::safetensors::load(written, &Device::Cpu).unwrap()[name].clone();
    let change = (merged - stored.to_dtype(DType::F32).unwrap()).unwrap();
    let wanted = up.matmul(&down).unwrap();
    let off = (change - wanted).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    assert!(off.to_scalar::<f32>().unwrap() < 1e-7, "{off}");
}

#[test]
fn few_prompts_are_said_not_to_be_held_out() {
    let folder = tempfile::tempdir().unwrap();
    let [model, prompts] = ["model", "prompts.txt"].map(|name| folder.path().join(name));
    fs::write(&prompts, "fox\ncat\nfox\n").unwrap();
    let base = repository("assets/mini-flux/base");
    let convert = ["convert", text(&base), "-o", text(&model), "--radius", "4", "--prompts", text(&prompts)];
    let said = stderr_of(0, &[&convert[..], &SHORT, &["--sample-size", "64"]].concat());
    assert!(said.contains("2 prompts are too few to hold some out"), "{said}");
}
