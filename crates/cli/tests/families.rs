//! The families that are not FLUX on the command line: converted, distilled, verified and drawn, each from what people
//! have of it.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::{assemble_pipeline, assert_close, fixture, relative_error, seeded_file};
use common::{complaint, json, repository, run, text};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Distils what `arguments` name into `model`.
fn distil(arguments: &[&str], model: &Path) {
    let training = ["--radius", "2", "--steps", "6", "--sample-count", "6", "--sample-steps", "3", "--batch", "3"];
    let further = ["--lr", "3e-3", "-o", text(model)];
    run(0, &[&["convert"], arguments, &training[..], &further[..]].concat());
    let record: toml::Table = std::fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
    let loss = |key: &str| record["distillation"][key].as_float().unwrap();
    assert!(loss("first_loss") > 0.0 && loss("last_loss") > 0.0 && loss("first_loss") != loss("last_loss"));
    run(0, &["verify", text(model)]);
}

/// Draws a picture, and one more with full attention, which must differ.
fn draw(model: &Path, arguments: &[&str]) -> PathBuf {
    let (windowed, full) = (model.with_extension("png"), model.with_extension("full.png"));
    let common = [&["generate", text(model), "--steps", "3", "--seed", "4"], arguments].concat();
    run(0, &[&common[..], &["-o", text(&windowed)]].concat());
    run(0, &[&common[..], &["-o", text(&full), "--attention", "full"]].concat());
    let pixels = |path: &Path| image::open(path).unwrap().to_rgb8();
    assert!(pixels(&windowed) != pixels(&full), "the window changes nothing");
    windowed
}

/// A checkpoint of a fixture's names in one file.
fn checkpoint(family: &str, folder: &Path) -> PathBuf {
    let shapes = repository(&format!("tests/fixtures/{family}/original/shapes.json"));
    let tensors: HashMap<String, Tensor> = seeded_file(shapes, "").into_iter().collect();
    let path = folder.join(format!("{family}.safetensors"));
    candle_core::safetensors::save(&tensors, &path).unwrap();
    path
}

/// Everything that is done with a model, once, from a diffusers folder on.
fn whole_pipeline(name: &str, arguments: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (original, model) = (path("original"), path("linear"));
    assemble_pipeline(&repository(""), name, &original);
    distil(&[text(&original)], &model);
    let found = json(0, &["inspect", text(&model)]);
    assert_eq!((&found["family"], &found["layout"]), (&name.into(), &"diffusers".into()));
    draw(&model, arguments);
    let picture = path("bf16.png");
    let few = ["generate", text(&model), "--steps", "2", "--dtype", "bf16", "-o", text(&picture)];
    run(0, &[&few[..], arguments].concat());
    assert!(image::open(&picture).unwrap().to_rgb8().pixels().any(|pixel| pixel[0] != pixel[1]));
    let compared = json(0, &["compare", text(&original), text(&model), "-o", text(&path("report")), "--steps", "2"]);
    assert!(compared["attention_error"].as_array().unwrap().len() == 2 && compared["psnr"].as_f64().unwrap() > 0.0);

    let (patch, patched) = (path("patch.safetensors"), path("patched"));
    run(0, &["patch", "extract", text(&model), "--base", text(&original), "-o", text(&patch)]);
    run(0, &["patch", "apply", text(&patch), "--to", text(&original), "-o", text(&patched)]);
    let weights = |model: &Path| std::fs::read(model.join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    assert!(weights(&patched) == weights(&model), "the patch does not hold what was distilled");

    let pooled = path("pooled");
    let plan = ["--radius", "2", "--pool", "2", "--no-distill"];
    run(0, &[&["convert", text(&original), "-o", text(&pooled)], &plan[..]].concat());
    draw(&pooled, arguments);
}

/// A layer, with its outputs and inputs.
type Layer = (&'static str, [usize; 2]);

/// Rank 2, in the form of peft, on `layers`.
fn lora(layers: &[Layer], path: &Path) {
    let pair = |(name, [outputs, inputs]): &Layer| {
        let factor = |part: &str, shape: &[usize]| {
            let name = format!("transformer.{name}.{part}.weight");
            (name.clone(), clearform_testkit::seeded(&name, shape, "lora/"))
        };
        [factor("lora_A", &[2, *inputs]), factor("lora_B", &[*outputs, 2])]
    };
    let tensors: HashMap<String, Tensor> = layers.iter().flat_map(pair).collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// Beside the weights and baked into them, a LoRA does the same, whatever the family.
#[test]
fn loras_meet_every_family() {
    let cases: [(&str, &[Layer]); 3] = [
        ("dit", &[("transformer_blocks.0.attn1.to_q", [32, 32]), ("transformer_blocks.1.ff.net.2", [32, 128])]),
        ("pixart", &[("transformer_blocks.0.attn2.to_k", [24, 24]), ("adaln_single.linear", [144, 24])]),
        ("sd3", &[("transformer_blocks.0.attn2.to_q", [32, 32]), ("transformer_blocks.1.attn.add_k_proj", [32, 32])]),
    ];
    let plugins = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    for (family, layers) in cases {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assemble_pipeline(&repository(""), family, &path("original"));
        lora(layers, &path("lora.safetensors"));
        let prompt = if family == "dit" { &["--class", "3"][..] } else { &["a red apple"] };
        let draw = |model: &str, picture: &str, more: &[&str]| {
            let (model, picture) = (path(model), path(picture));
            let base = ["generate", text(&model), "--steps", "2", "--attention", "full", "-o", text(&picture)];
            let plugins = ["--plugin-dir", text(&plugins)];
            let said = complaint(0, &[&base[..], prompt, more, &plugins].concat());
            (image::open(&picture).unwrap().to_rgb8(), said)
        };
        let file = path("lora.safetensors");
        let plain = draw("original", "plain.png", &[]).0;
        let (beside, said) = draw("original", "beside.png", &["--lora", text(&file)]);
        assert!(said.contains("applied 4 of 4 tensors to 2 modules"), "{family}: {said}");
        assert_ne!(plain, beside, "{family}: the LoRA does nothing");
        let (original, baked) = (path("original"), path("baked"));
        let convert = ["convert", text(&original), "-o", text(&baked), "--no-distill", "--lora", text(&file)];
        run(0, &[&convert[..], &["--plugin-dir", text(&plugins)]].concat());
        let baked = draw("baked", "baked.png", &[]).0;
        let largest = baked.iter().zip(beside.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(largest <= 2, "{family}: baked and beside differ by {largest} of 255");
    }
}

#[test]
fn sd3_is_distilled_and_drawn() {
    whole_pipeline("sd3", &["a red apple", "--negative-prompt", "blurry", "--width", "48", "--height", "56"]);
}

#[test]
fn pixart_is_distilled_and_drawn() {
    whole_pipeline("pixart", &["a red apple", "--width", "48", "--height", "56"]);
}

#[test]
fn dit_is_distilled_and_drawn() {
    whole_pipeline("dit", &["--class", "7"]);
}

#[test]
fn a_class_model_says_what_it_draws() {
    let folder = tempfile::tempdir().unwrap();
    assemble_pipeline(&repository(""), "dit", folder.path());
    let said = complaint(1, &["generate", text(folder.path()), "a cat"]);
    assert!(said.contains("draws classes") && said.contains("--class 0 to 999"), "{said}");
    let said = complaint(1, &["generate", text(folder.path()), "--class", "1001"]);
    assert!(said.contains("expected 0 to 999, found 1001"), "{said}");
    run(2, &["generate", text(folder.path())]);
    run(2, &["generate", text(folder.path()), "a cat", "--class", "3"]);
}

#[test]
fn dit_and_sit_are_never_guessed() {
    let folder = tempfile::tempdir().unwrap();
    let (file, config) = (checkpoint("sit", folder.path()), folder.path().join("config.json"));
    let said = complaint(1, &["inspect", text(&file)]);
    assert!(said.contains("dit") && said.contains("sit") && said.contains("--family"), "{said}");
    std::fs::write(&config, r#"{"attention_head_dim": 12}"#).unwrap();
    let reading = ["--family", "sit", "--config", text(&config)];
    assert_eq!(json(0, &[&["inspect", text(&file)], &reading[..]].concat())["family"], "sit");

    // Its VAE is DiT's.
    let (components, model) = (folder.path().join("dit"), folder.path().join("linear"));
    assemble_pipeline(&repository(""), "dit", &components);
    distil(&[&[text(&file)], &reading[..], &["--components", text(&components)]].concat(), &model);
    assert_eq!(json(0, &["inspect", text(&model)])["family"], "sit");
    draw(&model, &["--class", "3"]);
}

#[test]
fn minrf_draws_digits_from_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let (file, digit) = (checkpoint("minrf", folder.path()), folder.path().join("digit.png"));
    run(0, &["generate", text(&file), "--class", "3", "--steps", "4", "-o", text(&digit)]);
    let picture = image::open(&digit).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), (32, 32));
    assert!(picture.pixels().all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]));
    let model = folder.path().join("linear");
    distil(&[text(&file), "--sample-size", "16"], &model);
    draw(&model, &["--class", "3", "--width", "16", "--height", "16"]);
}

/// Of FLUX, tests/commands.rs times a model.
#[test]
fn a_model_of_every_family_can_be_timed() {
    let folder = tempfile::tempdir().unwrap();
    let timed = |model: &Path, further: &[&str]| {
        let common = ["bench", "model", text(model), "--grid", "3x4", "--attention", "full", "clear:r=2"];
        let table = json(0, &[&common[..], &["--text", "5", "--repeat", "1"], further].concat());
        let rows = table["rows"].as_array().unwrap();
        assert!(rows.len() == 2 && rows.iter().all(|row| row["median_ms"].as_f64().unwrap() > 0.0), "{table}");
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

/// z <- z - v / N from 1 to 0, with v_u + w (v_c - v_u), by the program's own `forward`.
#[test]
fn minrf_is_drawn_as_its_sampler_goes() {
    let folder = tempfile::tempdir().unwrap();
    let file = checkpoint("minrf", folder.path());
    let (input, output) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let velocity = |z: &Tensor, t: f32, class: i64| -> Tensor {
        let labels = Tensor::new(&[class], &Device::Cpu).unwrap();
        let time = Tensor::new(&[t], &Device::Cpu).unwrap();
        let inputs = [("hidden_states", z.clone()), ("timestep", time), ("class_labels", labels)];
        let inputs: HashMap<String, Tensor> = inputs.map(|(name, tensor)| (name.to_owned(), tensor)).into();
        candle_core::safetensors::save(&inputs, &input).unwrap();
        run(0, &["forward", text(&file), "--inputs", text(&input), "-o", text(&output)]);
        fixture(&output)["sample"].clone()
    };
    let mut z = clearform_sampling::TorchGenerator::new(8).randn((1, 1, 16, 16)).unwrap();
    for step in (1..=3).rev() {
        let t = step as f32 / 3.0;
        let (conditional, unconditional) = (velocity(&z, t, 3), velocity(&z, t, 10));
        let guided = (&unconditional + ((conditional - &unconditional).unwrap() * 2.5).unwrap()).unwrap();
        z = (z - (guided / 3.0).unwrap()).unwrap();
    }
    let picture = folder.path().join("digit.png");
    let size = ["--width", "16", "--height", "16"];
    let drawing = ["--class", "3", "--steps", "3", "--guidance", "2.5", "--seed", "8", "-o", text(&picture)];
    run(0, &[&["generate", text(&file)], &size[..], &drawing[..]].concat());
    let drawn = image::open(&picture).unwrap().to_rgb8();
    let wanted = ((z.flatten_all().unwrap() * 0.5).unwrap() + 0.5).unwrap().clamp(0f32, 1f32).unwrap();
    let wanted: Vec<f32> = (wanted * 255.0).unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap();
    let largest = drawn.pixels().zip(&wanted).map(|(pixel, wanted)| (f32::from(pixel[0]) - wanted).abs());
    assert!(largest.fold(0.0, f32::max) <= 1.0);
}

/// The file of facebook's code and the folder that it becomes give the same.
#[test]
fn a_converted_original_predicts_what_it_did() {
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
    run(0, &["forward", text(&model), "--inputs", text(&input), "-o", text(&output)]);
    let sample = fixture(&output)["sample"].clone();
    assert_close("r3", &sample, &cases["6x6/r3/sample"], 2e-5);
    assert!(relative_error(&sample, &cases["6x6/full/sample"]).unwrap() > 1e-3);
}
