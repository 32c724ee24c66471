//! Killing the command at any moment loses nothing: it goes on to the very bits of an undisturbed run.
#![allow(clippy::unwrap_used)]

mod common;

use common::{clearform, repository, run, text};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Small enough for a test, and long enough to be killed ten times.
fn arguments<'a>(base: &'a str, model: &'a str) -> Vec<&'a str> {
    let short = "--sample-count 4 --sample-steps 2 --sample-size 64 --steps 6 --batch 2 --checkpoint-every 1";
    let convert = ["convert", base, "-o", model, "--radius", "3", "--attention-every", "2", "--threads", "2"];
    convert.into_iter().chain(short.split(' ')).collect()
}

fn tensors(model: &Path) -> Vec<u8> {
    std::fs::read(model.join("transformer/diffusion_pytorch_model.safetensors")).unwrap()
}

#[test]
fn a_killed_conversion_goes_on_bit_for_bit() {
    let base = repository("assets/mini-flux/base");
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let begun = Instant::now();
    run(0, &arguments(text(&base), text(&whole)));
    let length = begun.elapsed();
    for kill in 0..10 {
        let mut resume = arguments(text(&base), text(&killed));
        resume.push("--resume");
        let mut child = clearform(&resume).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(step_index(length, kill));
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

/// Moments all over a run, in an order that jumps about.
fn step_index(length: Duration, kill: u32) -> Duration {
    length * (kill * 7 % 10 + 1) / 12
}
