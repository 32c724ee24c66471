//! What a command writes takes the place of nothing that it was not told to replace, whenever that has appeared.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod common;

use common::{clearform, repository, run, stderr_of, text};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

/// As little as a distillation takes.
const SHORT: [&str; 8] = ["--sample-count", "2", "--sample-steps", "2", "--held-out", "2", "--steps", "2"];

fn dit() -> PathBuf {
    repository("assets/mini-dit/model")
}

fn weights(model: &Path) -> Vec<u8> {
    std::fs::read(model.join("transformer/diffusion_pytorch_model.safetensors")).unwrap()
}

fn started(arguments: &[&str]) -> Child {
    clearform(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn the_model_that_is_distilled_is_replaced_only_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    run(0, &["convert", text(&dit()), "-o", text(&model), "--radius", "4", "--no-distill"]);
    let (before, teacher) = (weights(&model), dit());
    let distill = ["distill", text(&model), "--teacher", text(&teacher)];
    let said = stderr_of(1, &[&distill[..], &SHORT, &["-o", text(&model)]].concat());
    assert!(said.contains("already exists; choose another name"), "{said}");
    assert!(weights(&model) == before);
    run(0, &[&distill[..], &SHORT, &["--overwrite"]].concat());
    assert!(weights(&model) != before);
}

#[test]
fn a_folder_that_appears_meanwhile_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (model, dit) = (folder.path().join("model"), dit());
    let convert = ["convert", text(&dit), "-o", text(&model), "--radius", "4"];
    let mut child = started(&[&convert[..], &SHORT].concat());
    while !folder.path().join("model.work").exists() {
        std::thread::yield_now();
    }
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("precious.txt"), "kept").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(std::fs::read_to_string(model.join("precious.txt")).unwrap(), "kept");
    // The training is not lost.
    std::fs::rename(&model, folder.path().join("moved")).unwrap();
    run(0, &[&convert[..], &SHORT, &["--resume"]].concat());
}

#[test]
fn images_of_several_processes_are_all_kept() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("out.png");
    let children: Vec<Child> = ["1", "2", "3", "4"]
        .map(|class| started(&["generate", text(&dit()), "--class", class, "--steps", "2", "-o", text(&image)]))
        .into();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let mut names: Vec<_> = folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["out-001.png", "out-002.png", "out-003.png", "out.png"]);
}

#[test]
fn samples_are_kept_where_they_stay() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (model, other, second, dit) = (at("model"), at("other"), at("second"), dit());
    run(0, &["convert", text(&dit), "-o", text(&other), "--radius", "4", "--no-distill"]);
    let convert = ["convert", text(&dit), "-o", text(&model), "--radius", "4"];
    for (samples, says) in [
        (at("model"), "whose files do not stay"),
        (at("model/samples"), "whose files do not stay"),
        (at("model.work/samples"), "whose files do not stay"),
        (at("other"), "in the portable model"),
        (at("other/samples"), "in the portable model"),
        (dit.clone(), "holds other files"),
    ] {
        let said = stderr_of(1, &[&convert[..], &SHORT, &["--samples", text(&samples)]].concat());
        assert!(said.contains(says) && said.contains("choose another folder"), "{said}");
    }
    assert!(!model.exists() && !at("model.work").exists());
    run(0, &["verify", text(&other)]);
    // Used again, they are what they are.
    run(0, &[&convert[..], &SHORT, &["--samples", text(&at("samples"))]].concat());
    let prompts = at("classes.txt");
    std::fs::write(&prompts, "1\n").unwrap();
    let again = ["convert", text(&dit), "-o", text(&second), "--radius", "4", "--prompts", text(&prompts)];
    let said = stderr_of(0, &[&again[..], &SHORT[4..], &["--samples", text(&at("samples"))]].concat());
    assert!(said.contains("--prompts has no effect: the samples in"), "{said}");
}
