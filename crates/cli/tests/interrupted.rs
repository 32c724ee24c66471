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
