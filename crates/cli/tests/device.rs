//! Compares the program in `CLEARFORM_PROGRAM`, which runs models on a GPU or a simulated one, with this build on the
//! CPU. `kernels/simulator/build.sh` builds such a program.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Tensor;
use clearform_testkit::assemble_pipeline;
use common::{Tiny, forward, forward_with, on_cpu, repository, text};
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
        let [cpu, device] = both(tiny.path(), &["--attention", plan]);
        let error = relative_error(&device, &cpu);
        assert!(error < 1e-5, "{plan} in f32: {error:e}");
        // The 16-bit kernels get heads of 24 channels padded with zeros.
        for dtype in ["bf16", "f16"] {
            let [rough, device] = both(tiny.path(), &["--attention", plan, "--dtype", dtype]);
            let error = relative_error(&device, &cpu);
            let rounding = relative_error(&rough, &cpu);
            assert!(error < 2.0 * rounding, "{plan} in {dtype}: {error:e}, on the CPU {rounding:e}");
        }
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
    // Position ids of the tokens are read on the CPU.
    let ids = 3 * 8 * (5 * 8 + 16);
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
    let training = ["--radius", "2", "--steps", "4", "--sample-count", "2", "--sample-steps", "2", "--batch", "2"];
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
