//! What models and images record of how they were made, and reports beside files that are not theirs.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_runtime::image_file::read_parameters;
use common::{copy_folder, json, repository, run, stderr_of, text};
use std::fs;
use std::path::Path;

/// The weights of mini-dit.
const WEIGHTS: &str = "model.safetensors";
/// As little as a distillation takes.
const SHORT: [&str; 8] = ["--sample-count", "2", "--sample-steps", "2", "--held-out", "2", "--steps", "2"];

fn record(model: &Path) -> toml::Table {
    fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap()
}

/// The names of the files that a model was made from.
fn sources(model: &Path) -> Vec<String> {
    let sources = record(model)["source"].as_array().unwrap().clone();
    sources.iter().map(|source| source["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_further_distillation_keeps_what_was_before() {
    let folder = tempfile::tempdir().unwrap();
    let [model, longer, other] = ["model", "longer", "other"].map(|name| folder.path().join(name));
    let teacher = repository("assets/mini-dit/model");
    run(0, &[&["convert", text(&teacher), "-o", text(&model), "--radius", "4"], &SHORT[..]].concat());
    let distill = |teacher: &Path, output: &Path| {
        stderr_of(0, &[&["distill", text(&model), "--teacher", text(teacher), "-o", text(output)], &SHORT[..]].concat())
    };
    let said = distill(&teacher, &longer);
    assert!(!said.contains("another teacher"), "{said}");
    assert_eq!(record(&longer)["distillation"]["earlier_steps"].as_integer(), Some(2));
    assert!(fs::read_to_string(longer.join("README.md")).unwrap().contains("They follow 2 steps of earlier trainings"));
    assert_eq!(sources(&longer), sources(&model));
    // The error that is left is a share of the undistilled one, however many trainings there were.
    let before = |model: &Path| record(model)["distillation"]["verdict"]["error_before"].as_float().unwrap();
    assert!((before(&longer) / before(&model) - 1.0).abs() < 1e-5, "{} and {}", before(&longer), before(&model));

    // A teacher with other weights is said and recorded.
    let changed = folder.path().join("changed");
    copy_folder(&teacher, &changed);
    let weights = changed.join(WEIGHTS);
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let said = distill(&changed, &other);
    assert!(said.contains("the student gets another teacher"), "{said}");
    assert_eq!(sources(&other).len(), sources(&model).len() + 1);
}

#[test]
fn a_patch_is_one_of_a_models_sources() {
    let folder = tempfile::tempdir().unwrap();
    let [model, patch, patched, again] =
        ["model", "p.safetensors", "patched", "again"].map(|name| folder.path().join(name));
    let base = repository("assets/mini-dit/model");
    run(0, &[&["convert", text(&base), "-o", text(&model), "--radius", "4"], &SHORT[..]].concat());
    run(0, &["patch", "extract", text(&model), "--base", text(&base), "-o", text(&patch)]);
    run(0, &["patch", "apply", text(&patch), "--to", text(&base), "-o", text(&patched)]);
    assert_eq!(sources(&patched).last().map(String::as_str), Some("p.safetensors"));
    let [recorded, shifted] = [record(&patched)["patch"].clone(), {
        let shift = ["--mode", "shift", "--base", text(&base), "--overwrite"];
        run(0, &[&["patch", "apply", text(&patch), "--to", text(&base), "-o", text(&patched)], &shift[..]].concat());
        record(&patched)["patch"].clone()
    }];
    assert_eq!(
        [&recorded["file"], &recorded["mode"]].map(toml::Value::as_str),
        [Some("p.safetensors"), Some("replace")]
    );
    assert_eq!([&shifted["mode"], &shifted["base"]].map(toml::Value::as_str), [Some("shift"), Some("model")]);
    // What is made from it keeps that.
    run(0, &["convert", text(&patched), "-o", text(&again), "--radius", "4", "--no-distill"]);
    assert_eq!(record(&again)["patch"], shifted);
    let distillation = &record(&model)["distillation"];
    assert_eq!(distillation["losses"].as_array().unwrap().len(), 3);
    assert_eq!(distillation["sample_size"], toml::Value::from(vec![32, 32]));
    assert_eq!(distillation["sample_steps"].as_integer(), Some(2));
}

#[test]
fn the_attention_of_controlnets_is_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("out.png");
    let [base, net, control] =
        ["base", "controlnet", "references.png"].map(|name| repository("assets/mini-flux").join(name));
    let arguments = ["generate", text(&base), "cat", "--steps", "1", "-o", text(&image)];
    let control = ["--controlnet", text(&net), "--control-image", text(&control)];
    run(0, &[&arguments[..], &control, &["--controlnet-attention", "clear:r=3"]].concat());
    let recorded = read_parameters(&image).unwrap().adapters;
    assert_eq!(recorded, "--controlnet controlnet --controlnet-attention clear:r=3");
    // One that acts in none of the steps is not recorded.
    let idle = folder.path().join("idle.png");
    let late = format!("{}:start=0.99", text(&net));
    let arguments = ["generate", text(&base), "cat", "--steps", "1", "-o", text(&idle), "--controlnet", &late];
    run(0, &[&arguments[..], &control[2..]].concat());
    assert_eq!(read_parameters(&idle).unwrap().adapters, "");
    let again = folder.path().join("again.png");
    let from = ["generate", text(&base), "--from-metadata", text(&image), "-o", text(&again)];
    assert!(stderr_of(0, &[&from[..], &control].concat()).contains("--controlnet-attention clear:r=3"));
}

#[test]
fn a_report_replaces_no_other_files() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let base = repository("assets/mini-dit/model");
    run(0, &["convert", text(&base), "-o", text(&model), "--radius", "4", "--no-distill"]);
    let report = folder.path().join("report");
    fs::create_dir(&report).unwrap();
    let taken = [("compare", "sheet.png"), ("compare", "report.json"), ("transfer", "transfer-nothing.png")];
    for (command, name) in taken {
        fs::write(report.join(name), "mine").unwrap();
        let arguments = [command, text(&base), text(&model), "-o", text(&report), "--steps", "1"];
        let said = stderr_of(1, &arguments);
        assert!(said.contains(name) && said.contains("pass --overwrite"), "{said}");
        assert_eq!(fs::read_to_string(report.join(name)).unwrap(), "mine");
        fs::remove_file(report.join(name)).unwrap();
    }
}

#[test]
fn a_config_that_no_model_has_is_not_complete() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&repository("assets/mini-dit/model"), folder.path());
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["n_heads"] = 7.into();
    fs::write(&path, config.to_string()).unwrap();
    let inspection = json(1, &["inspect", text(folder.path())]);
    assert_eq!(inspection["complete"], false);
    assert_eq!(inspection["unusable_components"][0]["name"], "transformer");
}
