//! Models and samples that are damaged: messages name the file, and the tensor if it is one.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{copy_folder, repository, run, stderr_of, text};
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// As little as a distillation takes.
const SHORT: [&str; 8] = ["--sample-count", "2", "--sample-steps", "2", "--held-out", "0", "--steps", "2"];

/// Multiplies the tensor `name` of a file by NaN.
fn damage(path: &Path, name: &str) {
    let mut tensors: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let damaged = tensors[name].to_dtype(DType::F32).unwrap() * f64::NAN;
    tensors.insert(name.to_owned(), damaged.unwrap().to_dtype(tensors[name].dtype()).unwrap());
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// The first matrix in a file.
fn a_matrix(path: &Path) -> String {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let mut names: Vec<String> = tensors.into_iter().filter(|(_, x)| x.rank() >= 2).map(|(name, _)| name).collect();
    names.sort();
    names.swap_remove(0)
}

#[test]
fn weights_with_nan_are_named_when_a_result_has_nan() {
    let folder = tempfile::tempdir().unwrap();
    for (asset, file, prompt) in [
        ("assets/mini-dit/model", "model.safetensors", ["--class", "3"]),
        ("assets/mini-flux/base", "transformer/diffusion_pytorch_model.safetensors", ["cat", "--steps=1"]),
        ("assets/mini-flux/base", "text_encoder/model.safetensors", ["cat", "--steps=1"]),
        ("assets/mini-flux/base", "vae/diffusion_pytorch_model.safetensors", ["cat", "--steps=1"]),
    ] {
        let model = folder.path().join(file.replace('/', "-"));
        copy_folder(&repository(asset), &model);
        let damaged = model.join(file);
        let name = match file.starts_with("vae") {
            true => "decoder.conv_in.weight".to_owned(),
            false => a_matrix(&damaged),
        };
        damage(&damaged, &name);
        let [output, image] = ["out", "png"].map(|end| model.with_added_extension(end));
        let said = stderr_of(1, &[&["generate", text(&model), "-o", text(&image)], &prompt[..]].concat());
        let tensor = format!("tensor {name:?} contains NaN or infinity");
        let place = if file.contains('/') { damaged.parent().unwrap() } else { &model };
        assert!(said.contains(&tensor) && said.contains(text(place)), "{file}: {said}");
        if !file.starts_with("vae") {
            let convert = ["convert", text(&model), "-o", text(&output), "--radius", "4"];
            let said = stderr_of(1, &[&convert[..], &SHORT].concat());
            assert!(said.contains(&tensor) && said.contains(text(place)), "{file}: {said}");
        }
    }
}

#[test]
fn a_controlnet_with_nan_is_named_when_a_result_has_nan() {
    let folder = tempfile::tempdir().unwrap();
    let [net, image, output] = ["net", "edges.png", "out.png"].map(|name| folder.path().join(name));
    copy_folder(&repository("assets/mini-flux/controlnet"), &net);
    image::RgbImage::new(128, 128).save(&image).unwrap();
    damage(&net.join("diffusion_pytorch_model.safetensors"), "controlnet_blocks.0.weight");
    let base = repository("assets/mini-flux/base");
    let control = ["--controlnet", text(&net), "--control-image", text(&image)];
    let arguments = ["generate", text(&base), "cat", "--steps=1", "-o", text(&output)];
    let said = stderr_of(1, &[&arguments[..], &control].concat());
    assert!(said.contains("\"controlnet_blocks.0.weight\" contains NaN") && said.contains(text(&net)), "{said}");
}

#[test]
fn samples_with_nan_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let [samples, output] = ["samples", "out"].map(|name| folder.path().join(name));
    let model = repository("assets/mini-dit/model");
    let convert = ["convert", text(&model), "-o", text(&output), "--radius", "4", "--samples", text(&samples)];
    let convert = [&convert[..], &SHORT].concat();
    run(0, &convert);
    let batch = fs::read_dir(&samples).unwrap().map(|entry| entry.unwrap().path());
    let batch = batch.filter(|path| text(path).contains("batch")).min().unwrap();
    damage(&batch, "latents");
    let refused = || {
        let said = stderr_of(1, &[&convert[..], &["--overwrite"]].concat());
        let _ = fs::remove_dir_all(output.with_added_extension("work"));
        said
    };
    let said = refused();
    assert!(said.contains(text(&batch)) && said.contains("tensor \"latents\" contains NaN"), "{said}");
    // Latents of images of another size, and a class that the model does not have.
    let mut tensors = candle_core::safetensors::load(&batch, &Device::Cpu).unwrap();
    tensors.insert("latents".to_owned(), Tensor::zeros((2, 3, 16, 16), DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&tensors, &batch).unwrap();
    let said = refused();
    assert!(said.contains(text(&batch)) && said.contains("expected \"latents\" [2, 1, 32, 32]"), "{said}");
    let settings = samples.join("set.json");
    let of_others =
        fs::read_to_string(&settings).unwrap().replacen("\"prompts\": [\n    0", "\"prompts\": [\n    77", 1);
    fs::write(&settings, of_others).unwrap();
    let said = refused();
    assert!(said.contains("samples of class 77, and this model has 0 to 9"), "{said}");
}

#[test]
fn small_files_of_a_model_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy_folder(&repository("assets/mini-flux/base"), &model);
    let refused = |expected: &str| {
        let said = stderr_of(1, &["generate", text(&model), "cat", "--steps", "1"]);
        assert!(said.contains(expected), "{said}");
    };
    let vocabulary = model.join("tokenizer/vocab.json");
    let kept = fs::read(&vocabulary).unwrap();
    fs::remove_file(&vocabulary).unwrap();
    refused("vocab.json is missing");
    fs::write(&vocabulary, kept).unwrap();
    let merges = model.join("tokenizer/merges.txt");
    let kept = fs::read(&merges).unwrap();
    fs::write(&merges, "").unwrap();
    refused("tokenizer: merges.txt: expected a line for each merge, found none");
    fs::write(&merges, kept).unwrap();
    let scheduler = model.join("scheduler/scheduler_config.json");
    fs::write(&scheduler, "{").unwrap();
    refused(&format!("{}: expected JSON", text(&scheduler)));
    let shown = String::from_utf8(run(1, &["inspect", text(&model)]).stdout).unwrap();
    assert!(shown.contains("component   scheduler: ") && shown.contains("NOT complete"), "{shown}");
}

/// Every command that reads a pipeline refuses a component that its class cannot be built from.
#[test]
fn components_are_checked_before_they_are_used() {
    let folder = tempfile::tempdir().unwrap();
    type Edit = fn(&mut HashMap<String, Tensor>);
    let cases: [(&str, Edit, &str); 5] = [
        (
            "text_encoder/model.safetensors",
            |tensors| drop(tensors.remove("text_model.encoder.layers.0.mlp.fc1.bias")),
            "tensor \"text_model.encoder.layers.0.mlp.fc1.bias\" is missing",
        ),
        (
            "text_encoder_2/model.safetensors",
            |tensors| drop(tensors.remove("encoder.final_layer_norm.weight")),
            "tensor \"encoder.final_layer_norm.weight\" is missing",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            |tensors| drop(tensors.remove("decoder.mid_block.attentions.0.to_q.bias")),
            "tensor \"decoder.mid_block.attentions.0.to_q.bias\" is missing",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            |tensors| {
                let four = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
                tensors.insert("decoder.conv_out.bias".to_owned(), four);
            },
            "\"decoder.conv_out.bias\" expected [3], found [4]",
        ),
        ("text_encoder_2/model.safetensors", |_| (), ""),
    ];
    for (index, (file, edit, expected)) in cases.into_iter().enumerate() {
        let [model, output] = ["model", "out"].map(|name| folder.path().join(format!("{name}{index}")));
        copy_folder(&repository("assets/mini-flux/base"), &model);
        let path = model.join(file);
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let place = text(path.parent().unwrap());
        let code = i32::from(!expected.is_empty());
        let image = folder.path().join("out.png");
        for command in [
            &["generate", text(&model), "cat", "--steps=1", "--width=64", "--height=64", "-o", text(&image)][..],
            &["inspect", text(&model)],
            &["convert", text(&model), "-o", text(&output), "--radius", "4", "--no-distill"],
        ] {
            let said = stderr_of(code, command);
            assert!(code == 0 || said.contains(place) && said.contains(expected), "{command:?}: {said}");
        }
    }
}

#[test]
fn tensors_that_a_component_does_not_have_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let [model, output] = ["model", "out"].map(|name| folder.path().join(name));
    copy_folder(&repository("assets/mini-flux/base"), &model);
    let path = model.join("vae/diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    tensors.insert("decoder.foo.weight".to_owned(), Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let said = stderr_of(0, &["convert", text(&model), "-o", text(&output), "--radius", "4", "--no-distill"]);
    assert!(said.contains("does not have are not used: \"decoder.foo.weight\", 1 in all"), "{said}");
}

#[test]
fn damaged_records_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let base = repository("assets/mini-dit/model");
    run(0, &["convert", text(&base), "-o", text(&model), "--radius", "4", "--no-distill"]);
    let record = model.join("clearform.toml");
    let whole = fs::read_to_string(&record).unwrap();
    for (damaged, expected) in [
        (String::new(), "found no edition; copy the file again"),
        (whole.replace("clear:r=4", "clear:r=four"), "attention \"clear:r=four\""),
    ] {
        fs::write(&record, damaged).unwrap();
        for command in ["inspect", "verify"] {
            let said = stderr_of(1, &[command, text(&model)]);
            assert!(said.contains(text(&record)) && said.contains(expected), "{command}: {said}");
        }
    }
}

#[test]
fn an_image_is_no_model() {
    let image = repository("assets/mini-dit/contact-sheet.png");
    let said = stderr_of(1, &["inspect", text(&image)]);
    assert!(said.contains("this is an image"), "{said}");
}
