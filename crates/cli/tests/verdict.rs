//! What `convert` says before it starts and after it has distilled, on mini-dit.
#![allow(clippy::unwrap_used)]

mod common;

use common::{clearform, json, repository, run, stderr_of, text};
use std::path::Path;

const TEACHER: &str = "assets/mini-dit/model";

/// Far too short a training.
fn convert<'a>(teacher: &'a str, model: &'a str, radius: &'a str) -> Vec<&'a str> {
    let short = "--steps 5 --sample-count 8 --sample-steps 4 --held-out 4";
    ["convert", teacher, "-o", model, "--radius", radius].into_iter().chain(short.split(' ')).collect()
}

fn verdict(model: &Path) -> toml::Table {
    let record: toml::Table = std::fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
    record["distillation"]["verdict"].as_table().unwrap().clone()
}

#[test]
fn a_short_training_is_judged_and_warned_about() {
    let teacher = repository(TEACHER);
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let arguments = convert(text(&teacher), text(&model), "4");
    let done = clearform(&arguments).output().unwrap();
    let (said, noted) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    assert!(done.status.success(), "{noted}");
    assert!(noted.contains("16 x 16 tokens: with clear:r=4 a token sees 14% of them"), "{noted}");
    assert!(noted.contains("warning: the student falls short of its teacher"), "{noted}");
    assert!(said.contains("error on 4 samples that were held out") && said.contains("4 images beside"), "{said}");

    let found = verdict(&model);
    let figure = |key: &str| found[key].as_float().unwrap();
    assert_eq!(found["samples"].as_integer(), Some(4));
    assert!(figure("error_after") > 0.01 * figure("power") && figure("error_after") < figure("error_before"));
    let levels: Vec<f64> =
        found["level"].as_array().unwrap().iter().map(|level| level["noise"].as_float().unwrap()).collect();
    assert_eq!(levels, [0.1, 0.3, 0.5, 0.7, 0.9]);
    assert!(std::fs::read_to_string(model.join("README.md")).unwrap().contains("How near it is to its teacher"));
    assert!(std::fs::read_to_string(model.join("distillation.html")).unwrap().contains("held-out error left"));
    run(0, &["verify", text(&model)]);
}

#[test]
fn a_required_error_is_an_exit_code() {
    let teacher = repository(TEACHER);
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let arguments = convert(text(&teacher), text(&model), "4");
    let noted = stderr_of(1, &[&arguments[..], &["--require-error", "0.1"]].concat());
    assert!(
        noted.contains("--require-error 0.1: 0.") && noted.contains("the model is written all the same"),
        "{noted}"
    );
    run(0, &["verify", text(&model)]);
    // Samples of a folder are kept, and used again for another radius.
    let samples = folder.path().join("samples");
    for radius in ["4", "6"] {
        let again = ["--samples", text(&samples), "--overwrite", "--require-error", "1.5"];
        let found = json(0, &[&convert(text(&teacher), text(&model), radius)[..], &again].concat());
        assert_eq!(found["verdict"]["samples"], 4);
        // As if it had been interrupted: what is missing is generated again.
        std::fs::remove_file(samples.join("batch-00000.safetensors")).unwrap();
    }
    assert!(samples.join("held-out-4/set.json").exists());
}

#[test]
fn a_window_that_covers_the_image_is_warned_about() {
    let teacher = repository(TEACHER);
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let training = "--radius 32 --steps 1 --batch 1 --sample-count 1 --sample-steps 1 --held-out 0";
    let arguments = ["convert", text(&teacher), "-o", text(&model)];
    let noted = stderr_of(0, &arguments.into_iter().chain(training.split(' ')).collect::<Vec<_>>());
    assert!(noted.contains("covers all of 16 x 16 tokens"), "{noted}");
    assert!(!noted.contains("falls short"), "{noted}");
}

#[test]
fn a_time_needs_its_unit() {
    let message = stderr_of(2, &["convert", "a", "-o", "b", "--time", "5"]);
    assert!(message.contains("expected a time with its unit: 90s, 5m, 2h"), "{message}");
    let message = stderr_of(2, &["convert", "a", "-o", "b", "--losses", "1,2"]);
    assert!(message.contains("expected three weights"), "{message}");
}

#[test]
fn an_open_end_needs_held_out_samples_and_excludes_nothing_else() {
    let teacher = repository(TEACHER);
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let refused = |code, options: &str| {
        let arguments = ["convert", text(&teacher), "-o", text(&model)];
        stderr_of(code, &arguments.into_iter().chain(options.split(' ')).collect::<Vec<_>>())
    };
    assert!(refused(1, "--steps auto --held-out 0").contains("needs samples that are held out"));
    assert!(refused(1, "--steps 5 --time 1m").contains("excludes --steps"));
    assert!(refused(2, "--steps some").contains("expected a number or auto"));
    assert!(!model.exists());
    // The time is then the most that it may take.
    let short = "--radius 4 --steps auto --time 2s --sample-count 8 --sample-steps 4 --held-out 2 --images-every 0";
    let arguments = ["convert", text(&teacher), "-o", text(&model)];
    let noted = stderr_of(0, &arguments.into_iter().chain(short.split(' ')).collect::<Vec<_>>());
    assert!(noted.contains("steps fit into the time"), "{noted}");
}
