//! The families other than FLUX on the command line: converted, distilled, verified, compared and used to generate
//! images.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_runtime::RgbImage;
use clearform_testkit::{assemble_pipeline, assert_close, fixture, relative_error, seeded_file};
use common::{json, on_cpu, repository, run, runs_on_gpu, stderr_of, text};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Distils the source that `arguments` name to `model`, and compares the first and last loss with `losses`. They are
/// those of an earlier run: the tests of clearform-distill compare losses with PyTorch's.
fn distil(arguments: &[&str], model: &Path, losses: [f64; 2]) {
    let training = ["--radius", "2", "--steps", "6", "--sample-count", "6", "--sample-steps", "3", "--batch", "3"];
    let further = ["--lr", "3e-3", "--losses", "1,0.5,0.5", "--held-out", "0", "-o", text(model)];
    run(0, &[&["convert"], arguments, &training[..], &further[..]].concat());
    let record: toml::Table = std::fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
    let loss = |key: &str| record["distillation"][key].as_float().unwrap();
    for (key, wanted) in ["first_loss", "last_loss"].into_iter().zip(losses) {
        // bf16 activations, which a GPU has, change losses by up to 2%.
        assert!((loss(key) / wanted - 1.0).abs() < 0.02, "{key} of {arguments:?}: {}, expected {wanted}", loss(key));
    }
    run(0, &["verify", text(model)]);
}

/// Generates an image.
fn generate(model: &Path, arguments: &[&str]) -> RgbImage {
    let path = model.with_extension("png");
    run(0, &[&["generate", text(model), "--overwrite", "-o", text(&path)], arguments].concat());
    image::open(&path).unwrap().to_rgb8()
}

/// Generates an image with the model's attention and one with full attention, and checks that they differ.
fn check_window(model: &Path, arguments: &[&str]) {
    let common = [&["--steps", "3", "--seed", "4"], arguments].concat();
    let full = [&common[..], &["--attention", "full"]].concat();
    assert!(generate(model, &common) != generate(model, &full), "the window changes nothing");
}

/// Largest difference, of 255, between images that should be equal but for rounding: `in_f32` on a CPU. A GPU computes
/// attention in 16 bits.
fn rounding(in_f32: u8) -> u8 {
    if runs_on_gpu() { 8 } else { in_f32 }
}

/// PSNR in dB.
fn psnr(got: &RgbImage, wanted: &RgbImage) -> f64 {
    assert_eq!(got.dimensions(), wanted.dimensions());
    let squares = got.as_raw().iter().zip(wanted.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2));
    -10.0 * (squares.sum::<f64>() / got.as_raw().len() as f64 / 255f64.powi(2)).log10()
}

/// Runs `compare` and checks its figures against its contact sheet, and the sheet against `generate`.
fn check_comparison(original: &Path, model: &Path, prompt: &[&str]) {
    /// Pixels between the images of a sheet.
    const GAP: u32 = 4;
    let report = model.with_extension("report");
    let found = json(0, &["compare", text(original), text(model), "-o", text(&report), "--steps", "2"]);
    let written = std::fs::read(report.join("report.json")).unwrap();
    assert_eq!(found, serde_json::from_slice::<serde_json::Value>(&written).unwrap());
    let pairs = found["pictures"].as_array().unwrap();
    assert_eq!(pairs.len(), 4);
    for (role, path) in [("teacher", original), ("student", model)] {
        assert_eq!(found[role]["name"], path.file_name().unwrap().to_str().unwrap());
    }
    assert!(found["speedup"].as_f64().unwrap() > 0.0);
    let page = std::fs::read_to_string(report.join("report.html")).unwrap();
    assert!(pairs.iter().all(|pair| page.contains(pair["prompt"].as_str().unwrap())));

    let sheet = image::open(report.join("sheet.png")).unwrap().to_rgb8();
    let (width, height) = ((sheet.width() - GAP) / 4 - GAP, (sheet.height() - GAP) / 3 - GAP);
    let tile = |column: usize, row: u32| {
        let left = GAP + column as u32 * (width + GAP);
        image::imageops::crop_imm(&sheet, left, GAP + row * (height + GAP), width, height).to_image()
    };
    let measured: Vec<f64> = (0..4).map(|column| psnr(&tile(column, 0), &tile(column, 1))).collect();
    for (pair, measured) in pairs.iter().zip(&measured) {
        assert!((pair["psnr"].as_f64().unwrap() - measured).abs() < 1e-6, "{measured} dB: {pair}");
        assert!((0.0..1.0).contains(&pair["ssim"].as_f64().unwrap()), "{pair}");
    }
    assert!((found["psnr"].as_f64().unwrap() - measured.iter().sum::<f64>() / 4.0).abs() < 1e-6);
    let undistilled: Vec<f64> = (0..4).map(|column| psnr(&tile(column, 0), &tile(column, 2))).collect();
    assert!((found["undistilled"][0].as_f64().unwrap() - undistilled.iter().sum::<f64>() / 4.0).abs() < 1e-6);
    let again = stderr_of(1, &["compare", text(original), text(model), "-o", text(&report)]);
    assert!(again.contains("report.html: already exists; pass --overwrite"), "{again}");
    // The other way round is surely a mistake.
    for command in ["compare", "transfer"] {
        let swapped = stderr_of(1, &[command, text(model), text(original), "-o", text(&report), "--overwrite"]);
        assert!(swapped.contains("expected the original first"), "{swapped}");
    }
    // The seed of the second prompt is 1. `compare` runs a batch, whose sums round differently.
    let second = [prompt, &["--steps", "2", "--seed", "1"]].concat();
    for (row, model) in [original, model].into_iter().enumerate() {
        let wanted = generate(model, &second);
        let got = tile(1, row as u32);
        let largest = got.iter().zip(wanted.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(largest <= rounding(1), "{} differs by {largest} of 255", model.display());
    }
    let errors = found["attention_error"].as_array().unwrap();
    assert_eq!(errors.len(), 2);
    for error in errors.iter().map(|error| error[1].as_f64().unwrap()) {
        assert!(error > 0.02 && error < 1.0, "{errors:?}");
    }
}

/// A conversion that keeps full attention has no errors.
#[test]
fn a_model_compared_with_itself_has_no_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (original, copy, report) = (path("original"), path("copy"), path("report"));
    assemble_pipeline(&repository(""), "dit", &original);
    run(0, &["convert", text(&original), "-o", text(&copy), "--attention", "full", "--no-distill"]);
    let found = json(0, &["compare", text(&original), text(&copy), "-o", text(&report), "--steps", "2"]);
    assert_eq!(found["ssim"], 1.0);
    assert!(found["psnr"].is_null(), "JSON has no infinity: {found}");
    let errors = found["attention_error"].as_array().unwrap();
    assert_eq!(errors.iter().map(|error| error[1].as_f64().unwrap()).collect::<Vec<_>>(), [0.0, 0.0]);
}

/// Writes a single-file checkpoint with a fixture's tensor names.
fn checkpoint(family: &str, folder: &Path) -> PathBuf {
    let shapes = repository(&format!("tests/fixtures/{family}/original/shapes.json"));
    let tensors: HashMap<String, Tensor> = seeded_file(shapes, "").into_iter().collect();
    let path = folder.join(format!("{family}.safetensors"));
    candle_core::safetensors::save(&tensors, &path).unwrap();
    path
}

/// Takes a diffusers folder through every command. `second_prompt` is that which `compare` uses second.
fn check_family(name: &str, arguments: &[&str], second_prompt: &[&str], losses: [f64; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (original, model) = (path("original"), path("linear"));
    assemble_pipeline(&repository(""), name, &original);
    distil(&[text(&original)], &model, losses);
    let found = json(0, &["inspect", text(&model)]);
    assert_eq!((&found["family"], &found["layout"]), (&name.into(), &"diffusers".into()));
    check_window(&model, arguments);
    let few = [&["--steps", "2"], arguments].concat();
    let in_bf16 = generate(&model, &[&few[..], &["--dtype", "bf16"]].concat());
    let in_f32 = on_cpu(|| generate(&model, &[&few[..], &["--dtype", "f32"]].concat()));
    let difference = psnr(&in_bf16, &in_f32);
    assert!(difference > 40.0, "bf16: {difference} dB");
    check_comparison(&original, &model, second_prompt);

    let (patch, patched) = (path("patch.safetensors"), path("patched"));
    run(0, &["patch", "extract", text(&model), "--base", text(&original), "-o", text(&patch)]);
    run(0, &["patch", "apply", text(&patch), "--to", text(&original), "-o", text(&patched)]);
    let weights = |model: &Path| std::fs::read(model.join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    assert!(weights(&patched) == weights(&model), "the patch does not contain what was distilled");

    let pooled = path("pooled");
    let plan = ["--radius", "2", "--pool", "2", "--no-distill"];
    run(0, &[&["convert", text(&original), "-o", text(&pooled)], &plan[..]].concat());
    check_window(&pooled, arguments);
}

/// A layer's name, outputs and inputs.
type Layer = (&'static str, [usize; 2]);

/// Writes a LoRA of rank 2 for `layers`, with peft's tensor names.
fn write_lora(layers: &[Layer], path: &Path) {
    let factors = |(name, [outputs, inputs]): &Layer| {
        let factor = |part: &str, shape: &[usize]| {
            let name = format!("transformer.{name}.{part}.weight");
            (name.clone(), clearform_testkit::seeded(&name, shape, "lora/"))
        };
        [factor("lora_A", &[2, *inputs]), factor("lora_B", &[*outputs, 2])]
    };
    let tensors: HashMap<String, Tensor> = layers.iter().flat_map(factors).collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// A LoRA has the same effect at run time and merged into the weights, in every family.
#[test]
fn loras_apply_to_every_family() {
    let cases: [(&str, &[Layer]); 3] = [
        ("dit", &[("transformer_blocks.0.attn1.to_q", [32, 32]), ("transformer_blocks.1.ff.net.2", [32, 128])]),
        ("pixart", &[("transformer_blocks.0.attn2.to_k", [24, 24]), ("adaln_single.linear", [144, 24])]),
        ("sd3", &[("transformer_blocks.0.attn2.to_q", [32, 32]), ("transformer_blocks.1.attn.add_k_proj", [32, 32])]),
    ];
    for (family, layers) in cases {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assemble_pipeline(&repository(""), family, &path("original"));
        write_lora(layers, &path("lora.safetensors"));
        let prompt = if family == "dit" { &["--class", "3"][..] } else { &["a red apple"] };
        let generate = |model: &str, more: &[&str]| {
            let model = path(model);
            let image = path("image.png");
            let base =
                ["generate", text(&model), "--steps", "2", "--attention", "full", "--overwrite", "-o", text(&image)];
            let message = stderr_of(0, &[&base[..], prompt, more].concat());
            (image::open(&image).unwrap().to_rgb8(), message)
        };
        let file = path("lora.safetensors");
        let plain = generate("original", &[]).0;
        let (at_runtime, message) = generate("original", &["--lora", text(&file)]);
        assert!(message.contains("applied 4 of 4 tensors to 2 modules"), "{family}: {message}");
        assert_ne!(plain, at_runtime, "{family}: the LoRA has no effect");
        let original = path("original");
        let merged = path("merged");
        run(0, &["convert", text(&original), "-o", text(&merged), "--no-distill", "--lora", text(&file)]);
        let merged = generate("merged", &[]).0;
        let largest = merged.iter().zip(at_runtime.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(largest <= rounding(2), "{family}: merged and at run time differ by {largest} of 255");
    }
}

/// Converting and distilling in two commands gives the same tensors as in one.
#[test]
fn distill_trains_as_convert_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (original, at_once, bare, trained) = (path("original"), path("at-once"), path("bare"), path("trained"));
    assemble_pipeline(&repository(""), "dit", &original);
    let training =
        "--steps 3 --sample-count 4 --sample-steps 2 --batch 2 --held-out 0 --seed 5".split(' ').collect::<Vec<_>>();
    run(0, &[&["convert", text(&original), "-o", text(&at_once), "--radius", "2"], &training[..]].concat());
    run(0, &["convert", text(&original), "-o", text(&bare), "--radius", "2", "--no-distill"]);
    // What the record says of the model's parts stays.
    let parts = "\n[[component]]\nname = \"vae\"\nfile = \"ae.safetensors\"\nsha256 = \"00\"\n\n[[adapter]]\nname = \
                 \"style.safetensors\"\nsha256 = \"11\"\nstrength = 0.5\n";
    let record = |model: &Path| std::fs::read_to_string(model.join("clearform.toml")).unwrap();
    std::fs::write(bare.join("clearform.toml"), record(&bare) + parts).unwrap();
    let distill = ["distill", text(&bare), "--teacher", text(&original), "-o", text(&trained)];
    run(0, &[&distill[..], &training].concat());
    let weights = |model: &Path| std::fs::read(model.join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    assert!(weights(&trained) == weights(&at_once));
    assert!(weights(&trained) != weights(&bare), "nothing was trained");
    run(0, &["verify", text(&trained)]);
    let kept = record(&trained);
    assert!(kept.contains("file = \"ae.safetensors\"") && kept.contains("name = \"style.safetensors\""), "{kept}");
    // The model itself is replaced only if that is asked for.
    let message = stderr_of(2, &[&distill[..4], &training].concat());
    assert!(message.contains("--output <DIR>") && weights(&bare) != weights(&at_once), "{message}");
    run(0, &[&distill[..4], &["--overwrite"], &training].concat());
    assert!(weights(&bare) == weights(&at_once));
}

/// A copy with full attention behaves like the original under every condition.
#[test]
fn transfer_finds_no_difference_in_a_copy() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (original, copy, lora, report) = (path("original"), path("copy"), path("lora.safetensors"), path("report"));
    assemble_pipeline(&repository(""), "dit", &original);
    write_lora(&[("transformer_blocks.0.attn1.to_q", [32, 32]), ("transformer_blocks.1.ff.net.2", [32, 128])], &lora);
    run(0, &["convert", text(&original), "-o", text(&copy), "--attention", "full", "--no-distill"]);
    let transfer = ["transfer", text(&original), text(&copy), "-o", text(&report), "--steps", "2"];
    let found = json(0, &[&transfer[..], &["--lora", text(&lora)]].concat());
    let conditions = found["conditions"].as_array().unwrap();
    assert_eq!(conditions.iter().map(|condition| &condition["name"]).collect::<Vec<_>>(), ["nothing", "LoRA"]);
    for condition in conditions {
        assert!(condition["psnr"].is_null(), "JSON has no infinity: {condition}");
        assert_eq!([&condition["ssim"], &condition["right"]], [1.0, 1.0], "{condition}");
    }
    assert_eq!(conditions[0]["effect"], 1.0);
    assert!(conditions[1]["effect"].as_f64().unwrap() < 0.999, "the LoRA has no effect: {found}");
    let files = ["report.json", "report.html", "transfer-nothing.png", "transfer-LoRA.png"];
    assert!(files.iter().all(|file| report.join(file).is_file()));
}

#[test]
fn sd3_runs_through_every_command() {
    let arguments = ["a red apple", "--negative-prompt", "blurry", "--width", "48", "--height", "56"];
    check_family("sd3", &arguments, &["a cat"], [16.105, 16.205]);
}

#[test]
fn pixart_runs_through_every_command() {
    check_family("pixart", &["a red apple", "--width", "48", "--height", "56"], &["a cat"], [2.7762, 2.6082]);
}

#[test]
fn dit_runs_through_every_command() {
    // Four of 1000 classes, evenly spread.
    check_family("dit", &["--class", "7"], &["--class", "250"], [2.3352, 2.2307]);
}

#[test]
fn class_models_refuse_prompts_and_wrong_classes() {
    let folder = tempfile::tempdir().unwrap();
    assemble_pipeline(&repository(""), "dit", folder.path());
    let message = stderr_of(1, &["generate", text(folder.path()), "a cat"]);
    assert!(message.contains("this model is class-conditional") && message.contains("--class 0 to 999"), "{message}");
    let message = stderr_of(1, &["generate", text(folder.path()), "--class", "1001"]);
    assert!(message.contains("expected 0 to 999, found 1001"), "{message}");
    run(1, &["generate", text(folder.path())]);
    run(2, &["generate", text(folder.path()), "a cat", "--class", "3"]);
}

#[test]
fn dit_and_sit_are_never_guessed_apart() {
    let folder = tempfile::tempdir().unwrap();
    let (file, config) = (checkpoint("sit", folder.path()), folder.path().join("config.json"));
    let message = stderr_of(1, &["inspect", text(&file)]);
    assert!(message.contains("dit") && message.contains("sit") && message.contains("--family"), "{message}");
    std::fs::write(&config, r#"{"attention_head_dim": 12}"#).unwrap();
    let reading = ["--family", "sit", "--config", text(&config)];
    assert_eq!(json(0, &[&["inspect", text(&file)], &reading[..]].concat())["family"], "sit");

    // SiT uses DiT's VAE.
    let components = folder.path().join("dit");
    let model = folder.path().join("linear");
    assemble_pipeline(&repository(""), "dit", &components);
    distil(&[&[text(&file)], &reading[..], &["--components", text(&components)]].concat(), &model, [2.9137, 3.5056]);
    assert_eq!(json(0, &["inspect", text(&model)])["family"], "sit");
    check_window(&model, &["--class", "3"]);
}

#[test]
fn minrf_generates_digits_from_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = checkpoint("minrf", folder.path());
    let image = generate(&file, &["--class", "3", "--steps", "4"]);
    assert_eq!(image.dimensions(), (32, 32));
    assert!(image.pixels().all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]));
    let model = folder.path().join("linear");
    distil(&[text(&file), "--sample-size", "16"], &model, [2.6723, 3.4472]);
    check_window(&model, &["--class", "3", "--width", "16", "--height", "16"]);
}

/// FLUX is timed in commands.rs.
#[test]
fn a_model_of_every_family_can_be_timed() {
    let folder = tempfile::tempdir().unwrap();
    let timed = |model: &Path, further: &[&str]| {
        let common = ["bench", "model", text(model), "--grid", "3x4", "--attention", "full", "clear:r=2"];
        let table = json(0, &[&common[..], &["--repeat", "1"], further].concat());
        let rows = table["rows"].as_array().unwrap();
        let cases: Vec<_> =
            rows.iter().map(|row| [&row["grid"], &row["attention"]].map(|cell| cell.as_str().unwrap())).collect();
        assert_eq!(cases, [["3x4", "full"], ["3x4", "clear:r=2"]]);
        assert!(rows.iter().all(|row| row["median_ms"].as_f64().unwrap() > 0.0), "{table}");
    };
    for family in ["dit", "pixart", "sd3"] {
        let model = folder.path().join(family);
        assemble_pipeline(&repository(""), family, &model);
        timed(&model, &[]);
        timed(&model, &["--dtype", "bf16"]);
    }
    timed(&checkpoint("minrf", folder.path()), &[]);
    let config = folder.path().join("config.json");
    std::fs::write(&config, r#"{"attention_head_dim": 12}"#).unwrap();
    timed(&checkpoint("sit", folder.path()), &["--family", "sit", "--config", text(&config)]);
}

/// Compares `generate` with minRF's sampler, z <- z - v / N from t = 1 to 0 with v = v_u + w (v_c - v_u), on top of
/// `forward`.
#[test]
fn minrf_images_are_those_of_its_sampler() {
    let folder = tempfile::tempdir().unwrap();
    let file = checkpoint("minrf", folder.path());
    let input = folder.path().join("in.safetensors");
    let output = folder.path().join("out.safetensors");
    let velocity = |z: &Tensor, t: f32, class: i64| -> Tensor {
        let labels = Tensor::new(&[class], &Device::Cpu).unwrap();
        let time = Tensor::new(&[t], &Device::Cpu).unwrap();
        let inputs = [("hidden_states", z.clone()), ("timestep", time), ("class_labels", labels)];
        let inputs: HashMap<String, Tensor> = inputs.map(|(name, tensor)| (name.to_owned(), tensor)).into();
        candle_core::safetensors::save(&inputs, &input).unwrap();
        run(0, &["forward", text(&file), "--inputs", text(&input), "-o", text(&output), "--overwrite"]);
        fixture(&output)["sample"].clone()
    };
    let mut z = clearform_sampling::TorchGenerator::new(8).randn((1, 1, 16, 16)).unwrap();
    for step in (1..=3).rev() {
        let t = step as f32 / 3.0;
        let conditional = velocity(&z, t, 3);
        let unconditional = velocity(&z, t, 10);
        let guided = (&unconditional + ((conditional - &unconditional).unwrap() * 2.5).unwrap()).unwrap();
        z = (z - (guided / 3.0).unwrap()).unwrap();
    }
    let size = ["--width", "16", "--height", "16"];
    let sampling = ["--class", "3", "--steps", "3", "--guidance", "2.5", "--seed", "8"];
    let image = generate(&file, &[&size[..], &sampling[..]].concat());
    let wanted = ((z.flatten_all().unwrap() * 0.5).unwrap() + 0.5).unwrap().clamp(0f32, 1f32).unwrap();
    let wanted: Vec<f32> = (wanted * 255.0).unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap();
    let largest = image.pixels().zip(&wanted).map(|(pixel, wanted)| (f32::from(pixel[0]) - wanted).abs());
    assert!(largest.fold(0.0, f32::max) <= f32::from(rounding(1)));
}

/// A file for Facebook's code, converted, agrees with diffusers.
#[test]
fn a_converted_original_agrees_with_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    let (file, config) = (checkpoint("dit", folder.path()), folder.path().join("config.json"));
    std::fs::write(&config, r#"{"attention_head_dim": 16}"#).unwrap();
    let reading = ["--family", "dit", "--config", text(&config)];
    let model = folder.path().join("linear");
    run(0, &[&["convert", text(&file), "-o", text(&model), "--radius", "3", "--no-distill"], &reading[..]].concat());
    let cases = fixture(repository("tests/fixtures/dit/original/cases.safetensors"));
    let inputs = cases.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("6x6/input/")?, tensor.clone())));
    let inputs: HashMap<String, Tensor> = inputs.map(|(name, tensor)| (name.to_owned(), tensor)).collect();
    let (input, output) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    candle_core::safetensors::save(&inputs, &input).unwrap();
    run(0, &["forward", text(&model), "--inputs", text(&input), "-o", text(&output), "--overwrite"]);
    let sample = fixture(&output)["sample"].clone();
    assert_close("r3", &sample, &cases["6x6/r3/sample"], if runs_on_gpu() { 2e-2 } else { 2e-5 });
    assert!(relative_error(&sample, &cases["6x6/full/sample"]).unwrap() > 1e-3);
}
