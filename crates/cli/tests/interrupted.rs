//! A conversion that is killed at any moment can be resumed, and then gives the same bits as an undisturbed run.
#![allow(clippy::unwrap_used)]

mod common;

use common::{clearform, repository, run, text};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Small enough for a test, long enough to be killed ten times.
fn arguments<'a>(base: &'a str, model: &'a str) -> Vec<&'a str> {
    let short =
        "--sample-count 4 --sample-steps 2 --sample-size 64 --steps 6 --batch 2 --checkpoint-every 1 --held-out 2";
    let convert = ["convert", base, "-o", model, "--radius", "3", "--attention-every", "2", "--threads", "2"];
    convert.into_iter().chain(short.split(' ')).collect()
}

fn tensors(model: &Path) -> Vec<u8> {
    std::fs::read(model.join("transformer/diffusion_pytorch_model.safetensors")).unwrap()
}

#[test]
fn a_killed_conversion_resumes_bit_for_bit() {
    let base = repository("assets/mini-flux/base");
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let killed = folder.path().join("killed");
    let begun = Instant::now();
    run(0, &arguments(text(&base), text(&whole)));
    let length = begun.elapsed();
    for kill in 0..10 {
        let mut resume = arguments(text(&base), text(&killed));
        resume.push("--resume");
        let mut child = clearform(&resume).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(kill_time(length, kill));
        child.kill().unwrap();
        child.wait().unwrap();
        if killed.exists() {
            break;
        }
    }
    if !killed.exists() {
        run(0, &[&arguments(text(&base), text(&killed))[..], &["--resume"]].concat());
    }
    assert!(tensors(&whole) == tensors(&killed), "resumed and undisturbed runs differ");
    assert!(!folder.path().join("killed.work").exists());
}

/// Times spread over a run, early and late ones in turn.
fn kill_time(length: Duration, kill: u32) -> Duration {
    length * (kill * 7 % 10 + 1) / 12
}

/// Images in the work folder that are of other samples than those of this run.
#[test]
fn images_that_do_not_fit_are_drawn_again() {
    let folder = tempfile::tempdir().unwrap();
    let (base, model) = (repository("assets/mini-dit/model"), folder.path().join("model"));
    let training = folder.path().join("model.work/training");
    std::fs::create_dir_all(&training).unwrap();
    let latents = candle_core::Tensor::zeros((1, 1, 32, 32), candle_core::DType::F32, &candle_core::Device::Cpu);
    let kept = [("latents".to_owned(), latents.unwrap())];
    candle_core::safetensors::save(&kept.into(), training.join("undistilled.safetensors")).unwrap();
    let convert = ["convert", text(&base), "-o", text(&model), "--radius", "4", "--sample-count", "2", "--steps", "2"];
    run(0, &[&convert[..], &["--sample-steps", "2", "--held-out", "2", "--images-every", "1", "--resume"]].concat());
}

/// Samples in the work folder that another model has drawn.
#[test]
fn samples_of_another_model_are_named_with_the_ways_out() {
    let base = repository("assets/mini-flux/base");
    let folder = tempfile::tempdir().unwrap();
    let (model, samples) = (folder.path().join("model"), folder.path().join("model.work/samples"));
    std::fs::create_dir_all(&samples).unwrap();
    let settings = r#"{"edition": 1, "teacher": "FLUX.1-schnell", "prompts": ["a cat"], "count": 2, "batch": 2,
        "size": [64, 64], "steps": 1, "guidance": null, "seed": 0}"#;
    std::fs::write(samples.join("set.json"), settings).unwrap();
    let said = common::stderr_of(1, &[&arguments(text(&base), text(&model))[..], &["--resume"]].concat());
    let drawn =
        format!("the samples in {} were drawn by another model, FLUX.1-schnell, and not by base", text(&samples));
    assert!(said.contains(&drawn), "{said}");
    assert!(
        said.contains(&format!("choose another -o or --samples, or delete {} to draw them anew", text(&samples))),
        "{said}"
    );
}

/// Ctrl-C stops after a step; `--resume` needs none of the options again.
#[cfg(unix)]
#[test]
fn an_interrupted_conversion_says_where_it_stopped_and_resumes_without_options() {
    let base = repository("assets/mini-flux/base");
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let convert = ["convert", text(&base), "-o", text(&model)];
    let long =
        "--radius 3 --sample-count 2 --sample-steps 1 --sample-size 64 --steps 400 --batch 1 --held-out 0 --lr 2e-3";
    let arguments: Vec<&str> = convert.into_iter().chain(long.split(' ')).collect();
    let child = clearform(&arguments).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let begun = folder.path().join("model.work/training");
    let deadline = Instant::now() + Duration::from_secs(120);
    while !begun.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(100));
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("interrupted at step ") && said.contains("of 400; continue with --resume"), "{said}");
    assert!(!said.contains("error"), "{said}");
    assert!(!model.exists());

    // Another radius would be another student.
    let refused = common::stderr_of(1, &[&convert[..], &["--resume", "--radius", "4"]].concat());
    assert!(refused.contains("the run was begun with attention \"clear:r=3\", found \"clear:r=4\""), "{refused}");
    run(0, &[&convert[..], &["--resume"]].concat());
    let record: toml::Table = std::fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
    let distillation = &record["distillation"];
    assert_eq!((distillation["steps"].as_integer(), distillation["batch"].as_integer()), (Some(400), Some(1)));
    assert_eq!(record["attention"]["default"].as_str(), Some("clear:r=3"));
}
