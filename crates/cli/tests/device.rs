//! Compares the program in `CLEARFORM_PROGRAM`, which runs models on a GPU or a simulated one, with this build on the
//! CPU. `kernels/simulator/build.sh` builds such a program.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Tensor;
use clearform_testkit::assemble_pipeline;
use common::{Tiny, forward, forward_with, on_cpu, repository, stderr_of, text};
use std::path::Path;

fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    clearform_testkit::relative_error(got, want).unwrap()
}

/// The sample of `forward` on the CPU, and that of the tested program.
fn both(model: &Path, further: &[&str]) -> [Tensor; 2] {
    [on_cpu(|| forward(model, further)), forward(model, further)]
}

#[test]
#[ignore = "needs CLEARFORM_PROGRAM"]
fn forward_agrees_with_the_cpu() {
    let tiny = Tiny::new();
    for plan in ["full", "clear:r=3", "clear:r=2,d=2"] {
        let cpu = on_cpu(|| forward(tiny.path(), &["--attention", plan]));
        // The 16-bit kernels get heads of 24 channels padded with zeros.
        for dtype in ["bf16", "f16"] {
            let [rough, device] = both(tiny.path(), &["--attention", plan, "--dtype", dtype]);
            let error = relative_error(&device, &cpu);
            let rounding = relative_error(&rough, &cpu);
            assert!(error < 2.0 * rounding, "{plan} in {dtype}: {error:e}, on the CPU {rounding:e}");
        }
    }
}

/// There is no attention kernel for it, and the reference would take seconds for every layer of a real model.
#[test]
#[ignore = "needs CLEARFORM_PROGRAM"]
fn f32_is_refused_at_once() {
    let tiny = Tiny::new();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let arguments = ["forward", text(tiny.path()), "--inputs", "missing", "-o", text(&output), "--dtype", "f32"];
    let message = stderr_of(1, &arguments);
    let expected = "attention on a GPU is computed in bf16 or f16; pass --dtype bf16, or --device cpu";
    assert!(message.contains(expected), "{message}");
}

/// Streams are joined and split by rows of every batch entry, which are not contiguous as they are in a batch of one.
#[test]
#[ignore = "needs CLEARFORM_PROGRAM"]
fn a_batch_agrees_with_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    assemble_pipeline(&repository(""), "sd3", &original);
    let image = folder.path().join("%d.png");
    let run = || {
        let size = ["--width", "64", "--height", "64", "--steps", "2", "--seed", "3", "--batch", "2"];
        common::run(
            0,
            &[&["generate", text(&original), "a red apple", "--overwrite", "-o", text(&image)], &size[..]].concat(),
        );
        [0, 1].map(|number| image::open(folder.path().join(format!("{number}.png"))).unwrap().to_rgb8())
    };
    let wanted = on_cpu(run);
    let got = run();
    for (got, wanted) in got.iter().zip(&wanted) {
        let largest = got.iter().zip(wanted.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(largest <= 8, "the device differs from the CPU by {largest} of 255");
    }
}

#[test]
#[ignore = "needs CLEARFORM_PROGRAM"]
fn only_the_result_leaves_the_device() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let report = folder.path().join("report");
    let further = ["--dtype", "bf16", "--attention", "clear:r=3"];
    let sample = forward_with(tiny.path(), &further, &[("SIMULATOR_REPORT", text(&report))]);
    // Only the simulator writes a report.
    let Ok(report) = std::fs::read_to_string(report) else { return };
    let count = |what: &str| -> u64 {
        let line = report.lines().find(|line| line.starts_with(what));
        line.map_or(0, |line| line.rsplit('\t').next().unwrap().parse().unwrap())
    };
    // Position ids of the tokens and the timesteps, of at most eight samples, are read on the CPU.
    let ids = 3 * 8 * (5 * 8 + 16) + 4 * 8;
    let left = count("bytes from the device");
    assert!(left <= sample.elem_count() as u64 * 4 + ids, "{left} bytes left the device:\n{report}");
    let kernel = match std::env::var("SIMULATOR_CAPABILITY").as_deref() {
        Ok("90") => "forward_sm90a_bf16_64",
        _ => "forward_bf16_64",
    };
    assert!(count(kernel) > 0, "attention did not use {kernel}:\n{report}");
}

#[test]
#[ignore = "needs CLEARFORM_PROGRAM"]
fn losses_agree_with_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    assemble_pipeline(&repository(""), "sd3", &path("original"));
    // With the denoising loss, which is large: the difference of two predictions alone would be that of their rounding.
    let training = "--radius 2 --steps 4 --sample-count 2 --sample-steps 2 --batch 2 --held-out 2 --losses 1,0.5,0.5";
    let training: Vec<&str> = training.split(' ').collect();
    let convert = |name: &str| {
        let (original, model) = (path("original"), path(name));
        common::run(0, &[&["convert", text(&original), "-o", text(&model)], &training[..]].concat());
        let record: toml::Table = std::fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
        ["first_loss", "last_loss"].map(|key| record["distillation"][key].as_float().unwrap())
    };
    let (cpu, device) = (on_cpu(|| convert("cpu")), convert("device"));
    for (cpu, device) in cpu.into_iter().zip(device) {
        // Activations are bf16 on a GPU.
        assert!((cpu - device).abs() < 0.02 * cpu, "{device}, on the CPU {cpu}");
    }
}
