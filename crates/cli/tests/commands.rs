//! The contract of the command line: output, files and exit codes.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::{assert_close, fixture};
use clearform_weights::Checkpoint;
use common::{Tiny, clearform, expected, forward, json, repository, run, runs_on_gpu, stderr_of, text};
use serde_json::Value;

const QUERY: &str = "transformer_blocks.0.attn.to_q.weight";
const EMBEDDER: &str = "x_embedder.weight";
const BASE: &str = "assets/mini-flux/base";

#[test]
fn wrong_usage_exits_2() {
    run(2, &["convert"]);
    run(2, &["generate", "model", "prompt", "--no-such-flag"]);
    run(0, &["--help"]);
}

#[test]
fn inspect_reports_the_family_and_its_size() {
    let tiny = Tiny::new();
    let found = json(0, &["inspect", text(tiny.path())]);
    assert_eq!(found["family"], "flux");
    assert_eq!(found["layout"], "diffusers");
    assert_eq!(found["complete"], true);
    assert_eq!(found["depth"]["num_layers"], 2);
    let parameters: usize = tiny.tensors.values().map(Tensor::elem_count).sum();
    assert_eq!(found["parameters"], parameters);
}

/// Every file and folder of the fixtures and assets that `inspect` calls complete is converted, and passes `verify`.
#[test]
fn what_is_complete_can_be_converted_and_verified() {
    let work = tempfile::tempdir().unwrap();
    let mut folders = vec![repository("tests/fixtures"), repository("assets")];
    let mut complete = 0;
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path.clone());
            }
            if clearform(&["inspect", text(&path)]).output().unwrap().status.success() {
                complete += 1;
                let model = work.path().join(complete.to_string());
                run(0, &["convert", text(&path), "--no-distill", "--radius", "3", "-o", text(&model)]);
                run(0, &["verify", text(&model)]);
            }
        }
    }
    assert!(complete >= 8, "{complete}");
}

#[test]
fn inspect_names_each_wrong_tensor() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let inspect_changed = |change: &dyn Fn(&mut Tiny)| {
        let mut tiny = Tiny::new();
        change(&mut tiny);
        tiny.save();
        stderr_of(1, &["inspect", text(tiny.path())])
    };
    let missing = inspect_changed(&|tiny| drop(tiny.tensors.remove(QUERY)));
    assert!(missing.contains(QUERY) && missing.contains("missing"), "{missing}");
    let extra = inspect_changed(&|tiny| drop(tiny.tensors.insert("stray.weight".into(), zeros(&[3]))));
    assert!(extra.contains("stray.weight") && extra.contains("not understood"), "{extra}");
    let misshapen = inspect_changed(&|tiny| drop(tiny.tensors.insert(QUERY.into(), zeros(&[48, 47]))));
    assert!(misshapen.contains(QUERY) && misshapen.contains("[48, 47]"), "{misshapen}");
    let wrong = inspect_changed(&|tiny| {
        let tensor = tiny.tensors.remove(QUERY).unwrap();
        tiny.tensors.insert("transformer_blocks.0.attn.to_query.weight".into(), tensor);
    });
    assert!(wrong.contains(QUERY) && wrong.contains("to_query"), "{wrong}");
}

#[test]
fn files_that_are_no_models_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n").unwrap();
    let message = stderr_of(1, &["inspect", text(&path)]);
    assert!(message.contains("model.safetensors") && message.contains("git-lfs"), "{message}");
    let nowhere = stderr_of(1, &["inspect", text(&folder.path().join("nowhere"))]);
    assert!(nowhere.contains("nowhere"), "{nowhere}");
}

#[test]
fn forward_agrees_with_diffusers() {
    let tiny = Tiny::new();
    assert_close("full", &forward(tiny.path(), &[]), &expected("full"), 2e-5);
    assert_close("r = 3", &forward(tiny.path(), &["--attention", "clear:r=3"]), &expected("r3"), 2e-5);
    assert_close("r = 4.5", &forward(tiny.path(), &["--attention", "clear:r=4.5"]), &expected("r4.5"), 2e-5);
}

#[test]
fn a_converted_model_runs_its_recorded_plan_and_verifies() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let model = folder.path().join("model");
    let convert = ["convert", text(tiny.path()), "-o", text(&model), "--radius", "3", "--no-distill"];
    let written = json(0, &convert);
    assert_eq!(written["attention"], "clear:r=3");
    assert!(!folder.path().join("model.work").exists());
    assert_close("recorded plan", &forward(&model, &[]), &expected("r3"), 2e-5);
    assert_close("full", &forward(&model, &["--attention", "full"]), &expected("full"), 2e-5);
    run(0, &["verify", text(&model)]);
    run(0, &["inspect", text(&model)]);
    for more in [&[][..], &["--dry-run"]] {
        let again = stderr_of(1, &[&convert[..], more].concat());
        assert!(again.contains("already exists; pass --overwrite"), "{again}");
    }
    let inside = model.join("file.safetensors");
    let refused = stderr_of(1, &["export", text(&model), "--to", "bfl", "-o", text(&inside)]);
    assert!(refused.contains("is inside the portable model"), "{refused}");
    let output = folder.path().join("distilled");
    let refused = stderr_of(1, &["distill", text(&model), "--teacher", text(&model), "-o", text(&output)]);
    assert!(refused.contains("is a linear model (attention clear:r=3), and no teacher"), "{refused}");
    for within in ["inner", "transformer/deep/inner", "../model/inner"] {
        let inner = model.join(within);
        let refused = stderr_of(1, &["convert", text(tiny.path()), "-o", text(&inner), "--no-distill"]);
        assert!(
            refused.contains("inner: is inside the portable model ") && refused.contains("choose a folder outside"),
            "{refused}"
        );
    }
    run(0, &["verify", text(&model)]);
    std::fs::write(model.join("README.md"), "changed").unwrap();
    let report = json(1, &["verify", text(&model)]);
    assert_eq!(report["changed"][0], "README.md");
}

#[test]
fn distilling_without_components_names_the_remedies() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let model = folder.path().join("model");
    let message = stderr_of(1, &["convert", text(tiny.path()), "-o", text(&model)]);
    for remedy in ["--components", "--samples", "--no-distill"] {
        assert!(message.contains(remedy), "{message}");
    }
    assert!(!model.exists() && !folder.path().join("model.work").exists());
}

#[test]
fn a_model_with_nan_is_written_with_a_warning() {
    let (mut model, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let broken = (&model.tensors[QUERY] * f64::NAN).unwrap();
    model.tensors.insert(QUERY.into(), broken);
    model.save();
    let output = folder.path().join("model");
    let written = json(0, &["convert", text(model.path()), "-o", text(&output), "--radius", "3", "--no-distill"]);
    assert_eq!(written["not_finite"], serde_json::json!([QUERY]));
}

#[test]
fn a_patch_carries_attention_to_a_fine_tune() {
    let (base, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let mut student = Tiny::new();
    let moved = (&student.tensors[QUERY] + 0.25).unwrap();
    student.tensors.insert(QUERY.into(), moved);
    student.save();
    let mut fine_tune = Tiny::new();
    let tuned = (&fine_tune.tensors[QUERY] * 2.0).unwrap();
    fine_tune.tensors.insert(QUERY.into(), tuned.clone());
    fine_tune.save();
    let path = |name: &str| folder.path().join(name);
    let (model, patch) = (path("model"), path("patch.safetensors"));
    run(0, &["convert", text(student.path()), "-o", text(&model), "--radius", "3", "--no-distill"]);
    let extracted = json(0, &["patch", "extract", text(&model), "--base", text(base.path()), "-o", text(&patch)]);
    assert_eq!(extracted["tensors"], 1);
    let apply = |mode: &str, more: &[&str]| {
        let output = path(mode);
        let arguments =
            ["patch", "apply", text(&patch), "--to", text(fine_tune.path()), "-o", text(&output), "--mode", mode];
        run(0, &[&arguments[..], more].concat());
        let written = fixture(output.join("transformer/diffusion_pytorch_model.safetensors"));
        assert!(written.keys().eq(fine_tune.tensors.keys()), "{mode}");
        let others = written.iter().filter(|(name, _)| *name != QUERY);
        others.for_each(|(name, tensor)| assert_close(name, tensor, &fine_tune.tensors[name], 0.0));
        written[QUERY].clone()
    };
    assert_close("replace", &apply("replace", &[]), &student.tensors[QUERY], 1e-7);
    let shifted = apply("shift", &["--base", text(base.path())]);
    assert_close("shift", &shifted, &(&tuned + 0.25).unwrap(), 1e-6);

    let output = path("again");
    let again = ["patch", "apply", text(&patch), "-o", text(&output), "--mode", "shift", "--base"];
    for shifted in [path("shift"), student.path().to_owned()] {
        let said = stderr_of(1, &[&again[..], &[text(base.path()), "--to", text(&shifted)]].concat());
        assert!(said.contains("twice"), "{said}");
    }
    let mut other = Tiny::new();
    other.tensors.insert(EMBEDDER.into(), (&other.tensors[EMBEDDER] * 1.5).unwrap());
    other.save();
    let (whole, cut) = (Checkpoint::open(&patch).unwrap(), path("cut.safetensors"));
    let mut metadata = whole.metadata().clone();
    metadata.insert("clearform.tensors".to_owned(), "2".to_owned());
    clearform_weights::save(&cut, &whole, &metadata).unwrap();
    let said = stderr_of(1, &["patch", "apply", text(&cut), "--to", text(fine_tune.path()), "-o", text(&output)]);
    assert!(said.contains("expected the 2 tensors that it was extracted with, found 1"), "{said}");
    let kept = stderr_of(1, &["patch", "extract", text(&model), "--base", text(base.path()), "-o", text(&patch)]);
    assert!(kept.contains("already exists; pass --overwrite"), "{kept}");
    let extract = ["patch", "extract", text(&model), "--base", text(other.path()), "-o", text(&patch), "--overwrite"];
    let said = stderr_of(1, &extract);
    assert!(said.contains("is not the model that") && said.contains(EMBEDDER), "{said}");
    let said = stderr_of(1, &["patch", "extract", text(&model), "--base", text(base.path()), "-o", "p.bin"]);
    assert!(said.contains("expected a name that ends in .safetensors"), "{said}");
}

/// A fine-tune in a single file gets the pipeline's other components from the patch's base, or lacks them in words.
#[test]
fn a_patched_fine_tune_has_the_components_of_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (base, model, patch) = (repository(BASE), path("model"), path("patch.safetensors"));
    let mut student = fixture(base.join("transformer/diffusion_pytorch_model.safetensors"));
    student.insert(QUERY.into(), (&student[QUERY] + 0.25).unwrap());
    let file = path("student.safetensors");
    candle_core::safetensors::save(&student.into_iter().collect(), &file).unwrap();
    let config = base.join("transformer/config.json");
    let reading = ["--config", text(&config), "--radius", "4", "--no-distill"];
    let written = run(0, &[&["convert", text(&file), "-o", text(&model)], &reading[..]].concat());
    let written = String::from_utf8(written.stdout).unwrap();
    assert!(written.contains("without scheduler, text_encoder") && written.contains("with --components"), "{written}");
    run(0, &["patch", "extract", text(&model), "--base", text(&base), "-o", text(&patch)]);
    let (tuned, output) = (base.join("transformer"), path("output"));
    let apply = ["patch", "apply", text(&patch), "--to", text(&tuned), "-o", text(&output), "--mode", "shift"];
    let found = json(0, &[&apply[..], &["--base", text(&base)]].concat());
    assert_eq!(found["missing_components"], serde_json::json!([]));
    let image = path("image.png");
    run(
        0,
        &["generate", text(&output), "a cat", "--steps", "1", "--width", "32", "--height", "32", "-o", text(&image)],
    );
}

/// What is converted again without training keeps what is known of its distillation and its adapters.
#[test]
fn a_conversion_of_a_linear_model_keeps_its_record() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let model = folder.path().join("model");
    run(0, &["convert", text(tiny.path()), "-o", text(&model), "--radius", "3", "--no-distill"]);
    let record = model.join("clearform.toml");
    let known = "[[adapter]]\nname = \"style.safetensors\"\nsha256 = \"22\"\nstrength = 0.75\n\n[distillation]\nsteps = 7\n\
                 batch = 8\nlearning_rate = 0.5\nsamples = 16\nseed = 1\nfirst_loss = 2.0\nlast_loss = 0.5\n\n[[file]]";
    let text_of_record = std::fs::read_to_string(&record).unwrap().replacen("[[file]]", known, 1);
    std::fs::write(&record, text_of_record).unwrap();
    let convert = |radius: &str| {
        let output = folder.path().join(radius);
        run(0, &["convert", text(&model), "-o", text(&output), "--radius", radius, "--no-distill", "--dtype", "bf16"]);
        std::fs::read_to_string(output.join("clearform.toml")).unwrap()
    };
    let same = convert("3");
    assert!(same.contains("steps = 7") && same.contains("style.safetensors"), "{same}");
    // The weights stay those that were distilled for the other radius.
    let other = convert("4");
    assert!(other.contains("steps = 7") && other.contains("attention = \"clear:r=3\""), "{other}");
    assert!(other.contains("style.safetensors") && other.contains("default = \"clear:r=4\""), "{other}");
}

#[test]
fn a_plan_with_a_layer_that_the_model_lacks_is_refused() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let (plan, model) = (folder.path().join("plan.toml"), folder.path().join("model"));
    std::fs::write(&plan, "default = \"clear:r=3\"\n\n[layers]\n\"transformer_blocks.90.attn\" = \"full\"\n").unwrap();
    let said =
        stderr_of(1, &["convert", text(tiny.path()), "-o", text(&model), "--attention", text(&plan), "--no-distill"]);
    assert!(said.contains("has no layer \"transformer_blocks.90.attn\"") && said.contains("such as"), "{said}");
    assert!(!model.exists() && !folder.path().join("model.work").exists());
}

/// Before anything is written, and also where nothing is trained, the gain of the windows is said.
#[test]
fn a_conversion_says_what_its_windows_gain() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let base = repository("assets/mini-dit/model");
    let convert = ["convert", text(&base), "-o", text(&model), "--radius", "32"];
    for more in ["--dry-run", "--no-distill"] {
        let said = stderr_of(0, &[&convert[..], &[more]].concat());
        let expected = "16 x 16 tokens: with clear:r=32 a token sees 100% of them";
        assert!(said.contains(expected) && said.contains("nothing would be gained"), "{more}: {said}");
        assert_eq!(said.contains("for training"), more == "--dry-run" && !runs_on_gpu(), "{said}");
    }
}

#[test]
fn attention_can_be_timed() {
    let attention = |more: &[&str]| {
        let common = ["bench", "attention", "--grid", "16x16", "--head-dim", "32", "--text", "8", "--repeat", "1"];
        json(0, &[&common[..], more].concat())
    };
    let pairs = |timing: &Value, kind: &str| timing[format!("{kind}_pairs")].as_u64().unwrap();
    let timing = attention(&["--radius", "4"]);
    // Image tokens attend to the disc and the text, text tokens to everything.
    assert_eq!(pairs(&timing, "useful"), pairs_inside(16, 4) + 256 * 8 + 8 * 264);
    assert!(pairs(&timing, "useful") < pairs(&timing, "visited"));
    // The 8 text tokens are padded to 32 lanes.
    assert!(pairs(&timing, "visited") <= (32 + 256) * 264);
    let median_ms = timing["median_ms"].as_f64().unwrap();
    for kind in ["useful", "visited"] {
        // Two products of 32 channels in each of 4 heads.
        let operations = (pairs(&timing, kind) * 2 * 2 * 32 * 4) as f64;
        let rate = timing[format!("{kind}_gflops")].as_f64().unwrap();
        assert!(median_ms > 0.0 && (rate * median_ms * 1e6 / operations - 1.0).abs() < 1e-9, "{timing}");
    }
    let pooled = attention(&["--attention", "clear:r=4,d=4", "--backward"]);
    for kind in ["useful", "visited"] {
        assert_eq!(pairs(&pooled, kind), pairs(&timing, kind) + 256 * 16);
    }
}

/// Ordered pairs of tokens of a square grid that are less than `radius` apart (CLEAR, section 3.2).
fn pairs_inside(edge: i64, radius: i64) -> u64 {
    let tokens = || (0..edge * edge).map(|index| (index / edge, index % edge));
    let pairs = tokens().flat_map(|a| tokens().map(move |b| (a, b)));
    let is_inside = |(a, b): &((i64, i64), (i64, i64))| (a.0 - b.0).pow(2) + (a.1 - b.1).pow(2) < radius.pow(2);
    pairs.filter(is_inside).count() as u64
}

/// A matrix of tokens by tokens would take 17 GB.
#[test]
fn attention_needs_memory_linear_in_the_tokens() {
    let limited = "ulimit -d 1000000 && exec \"$@\"";
    for backward in [&[][..], &["--backward"]] {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", limited, "sh", env!("CARGO_BIN_EXE_clearform"), "bench", "attention", "--grid", "256x256"]);
        let output = shell
            .args(["--radius", "8", "--heads", "1", "--head-dim", "64", "--text", "64", "--repeat", "1"])
            .args(backward)
            .output()
            .unwrap();
        assert!(output.status.success(), "{backward:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn tile_efficiency_agrees_with_the_paper() {
    let table = json(0, &["bench", "tiles", "--grid", "64x64", "--tiles", "8x8/8x8,2x64/2x64,cpu,gpu"]);
    let rows = table["rows"].as_array().unwrap();
    let percents = |tiles: &str| -> Vec<f64> {
        let found = rows.iter().filter(|row| row["tiles"] == tiles);
        found.map(|row| (100.0 * row["efficiency"].as_f64().unwrap()).round()).collect()
    };
    // arXiv 2412.16112, at r = 8, 16 and 32.
    assert_eq!(percents("8x8/8x8"), [36.0, 55.0, 75.0]);
    assert_eq!(percents("2x64/2x64"), [16.0, 34.0, 63.0]);
    assert_eq!(percents("gpu"), percents("8x8/8x8"));
    assert!(percents("cpu").iter().zip(percents("gpu")).all(|(cpu, gpu)| *cpu > gpu));
    // The name of earlier versions.
    let message = stderr_of(1, &["bench", "share", "--tiles", "8x8"]);
    assert!(message.contains("expected HxW/HxW"), "{message}");
}

#[test]
fn a_step_and_a_model_can_be_timed() {
    let step = ["bench", "step", "--width", "64", "--double", "1", "--single", "1", "--head-dim"];
    let timing = json(0, &[&step[..], &["16", "--grid", "4x5", "--text", "3", "--repeat", "1"]].concat());
    assert!(timing["median_ms"].as_f64().unwrap() > 0.0);
    assert_eq!((timing["grid"].as_str(), timing["attention"].as_str()), (Some("4x5"), Some("clear:r=16")));
    for head_dim in ["0", "48", "128"] {
        let message = stderr_of(1, &[&step[..], &[head_dim]].concat());
        assert!(
            message.contains(&format!("--width 64: expected a positive multiple of --head-dim {head_dim}")),
            "{message}"
        );
    }
    let tiny = Tiny::new();
    let model = ["bench", "model", text(tiny.path()), "--grid", "4x4,6x6", "--text", "3", "--repeat", "1"];
    let table = json(0, &model);
    let rows = table["rows"].as_array().unwrap();
    let cases: Vec<_> =
        rows.iter().map(|row| [&row["attention"], &row["grid"]].map(|cell| cell.as_str().unwrap())).collect();
    assert_eq!(cases, [["full", "4x4"], ["full", "6x6"], ["clear:r=16", "4x4"], ["clear:r=16", "6x6"]]);
    assert!(rows.iter().all(|row| row["median_ms"].as_f64().unwrap() > 0.0), "{table}");
}
