//! All-in-one files: a VAE and text encoders in the transformer's file work as they do in folders.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::fixture;
use clearform_weights::{InMemoryTensors, save};
use common::forms::{BothForms, Case, FLUX, PIXART, SD3, same_bits};
use common::{json, run, stderr_of, text};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;

fn check(case: &'static Case) {
    let both = BothForms::new(case);
    let config = both.path("folders/transformer/config.json");
    let file = both.path("one.safetensors");
    let found = json(0, &["inspect", text(&file), "--config", text(&config)]);
    let names: Vec<&str> = case.components.iter().map(|(component, _)| *component).collect();
    assert_eq!(found["components"], serde_json::json!(names));
    // Those whose sizes only a config.json tells are left out.
    let in_folders = json(0, &["inspect", text(&both.path("folders"))])["component_bytes"].clone();
    let in_file = found["component_bytes"].as_object().unwrap();
    assert!(!in_file.is_empty() && in_file.iter().all(|(name, bytes)| *bytes == in_folders[name]), "{found}");
    assert_eq!(in_folders.as_object().unwrap().len(), names.len());
    assert_eq!(both.generate_from_file(), both.generate(&both.path("folders")), "{}", case.family);

    let model = both.path("model");
    both.on_file(0, &["convert"], &["--no-distill", "-o", text(&model)]);
    run(0, &["verify", text(&model)]);
    for (component, _) in case.components {
        let name = both.weights(component).file_name().unwrap().to_owned();
        let got = fixture(model.join(component).join(&name));
        let wanted = fixture(both.weights(component));
        assert!(got.keys().eq(wanted.keys()), "{component}");
        assert!(got.iter().all(|(name, tensor)| same_bits(tensor, &wanted[name])), "{component}");
        let config = |folder: &str| -> Value {
            serde_json::from_slice(&fs::read(both.path(folder).join(component).join("config.json")).unwrap()).unwrap()
        };
        let got = config("model");
        let wanted = config("folders");
        let keys = wanted.as_object().unwrap().iter().filter(|(key, _)| got.get(*key).is_some());
        keys.for_each(|(key, value)| assert_eq!(&got[key], value, "{component}: {key}"));
    }
    assert_eq!(both.generate(&model), both.generate(&both.path("folders")));
}

#[test]
fn flux_in_one_file_is_the_same_model() {
    check(&FLUX);
}

#[test]
fn sd3_in_one_file_is_the_same_model() {
    check(&SD3);
}

#[test]
fn pixart_in_one_file_is_the_same_model() {
    check(&PIXART);
}

#[test]
fn every_tensor_of_a_component_is_reported() {
    let both = BothForms::new(&FLUX);
    let (file, model, others) = (both.path("one.safetensors"), both.path("model"), both.path("others"));
    let config = both.path("folders/transformer/config.json");
    let convert = ["convert", text(&file), "-o", text(&model), "--no-distill", "--components", text(&others)];
    let report = json(0, &[&convert[..], &["--config", text(&config)]].concat());
    let reports = report["component_reports"].as_object().unwrap();
    let reported: usize = reports.values().map(|report| report["outcomes"].as_object().unwrap().len()).sum();
    let of_component = |name: &&String| FLUX.components.iter().any(|(_, prefix)| name.starts_with(prefix));
    assert_eq!(reported, both.tensors.keys().filter(of_component).count());
    let skipped = |load_report: &Value| -> Vec<String> {
        let outcomes = load_report["outcomes"].as_object().unwrap().iter();
        outcomes.filter(|(_, outcome)| !outcome["skipped"]["reason"].is_null()).map(|(name, _)| name.clone()).collect()
    };
    assert_eq!(skipped(&reports["vae"]), [""; 0]);
    assert_eq!(skipped(&reports["text_encoder"]), ["text_model.embeddings.position_ids", "text_projection.weight"]);
    assert_eq!(skipped(&reports["text_encoder_2"]), ["encoder.embed_tokens.weight"]);
    let of_transformer = skipped(&report["load_report"]);
    assert_eq!(of_transformer.len(), reported + 2);
    assert_eq!(of_transformer.iter().filter(|name| name.ends_with("logit_scale")).count(), 2);
}

/// A tensor stored in fp8 with scale 0.25, and the values it stands for in bf16.
fn scaled(tensor: &Tensor) -> (Tensor, Tensor) {
    let stored = (tensor.to_dtype(DType::F32).unwrap() * 4.0).unwrap().to_dtype(DType::F8E4M3).unwrap();
    let product = (stored.to_dtype(DType::F32).unwrap() * 0.25).unwrap().to_dtype(DType::BF16).unwrap();
    (stored, product)
}

#[test]
fn text_encoders_in_scaled_fp8_are_dequantized_in_files_and_folders() {
    let mut both = BothForms::new(&FLUX);
    let prefix = FLUX.components[1].1;
    let (mut folder, mut products) = (InMemoryTensors::default(), HashMap::new());
    for (name, tensor) in fixture(both.weights("text_encoder_2")) {
        let Some(module) =
            name.strip_suffix("weight").filter(|_| name.contains("SelfAttention.q") || name.contains("wi_"))
        else {
            folder.insert(&name, tensor.clone());
            products.insert(name, tensor);
            continue;
        };
        let (stored, product) = scaled(&tensor);
        let scale = Tensor::new(0.25f32, &Device::Cpu).unwrap();
        both.tensors.insert(format!("{prefix}{name}"), stored.clone());
        both.tensors.insert(format!("{prefix}{module}scale_weight"), scale.clone());
        folder.insert(&name, stored);
        folder.insert(format!("{module}scale_weight"), scale);
        products.insert(name, product);
    }
    let marker = Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap();
    both.tensors.insert(format!("{prefix}scaled_fp8"), marker.clone());
    folder.insert("scaled_fp8", marker);
    both.save();
    let path = both.weights("text_encoder_2");
    let plain = both.generate(&both.path("folders"));
    candle_core::safetensors::save(&products, &path).unwrap();
    let wanted = both.generate(&both.path("folders"));
    assert_ne!(plain, wanted, "fp8 changes nothing");
    assert_eq!(both.generate_from_file(), wanted);
    save(&path, &folder, &BTreeMap::new()).unwrap();
    assert_eq!(both.generate(&both.path("folders")), wanted);
    let model = both.path("model");
    both.on_file(0, &["convert"], &["--no-distill", "-o", text(&model)]);
    let written = fixture(model.join("text_encoder_2/model.safetensors"));
    assert!(written.keys().eq(products.keys().collect::<std::collections::BTreeSet<_>>()));
    assert!(written.iter().all(|(name, tensor)| same_bits(tensor, &products[name])));

    folder.insert("encoder.block.0.layer.0.SelfAttention.k.weight_scale_inv", Tensor::new(1f32, &Device::Cpu).unwrap());
    save(&path, &folder, &BTreeMap::new()).unwrap();
    let message =
        stderr_of(1, &["generate", text(&both.path("folders")), "a red apple", "-o", text(&both.path("no.png"))]);
    assert!(message.contains("text_encoder_2") && message.contains("scaled by blocks"), "{message}");
}

#[test]
fn wrong_tensors_of_a_component_are_refused_by_name() {
    for (name, replaced, expected) in [
        ("vae.decoder.up.2.block.0.conv1.weight", None, "tensor \"decoder.up.2.block.0.conv1.weight\" is missing"),
        ("vae.encoder.conv_in.bias", Some(Tensor::zeros(5, DType::BF16, &Device::Cpu).unwrap()), "wrong shape"),
        (
            "text_encoders.t5xxl.transformer.encoder.strange",
            Some(Tensor::zeros(5, DType::BF16, &Device::Cpu).unwrap()),
            "tensor \"encoder.strange\" is not understood",
        ),
    ] {
        let mut both = BothForms::new(&FLUX);
        match replaced {
            None => drop(both.tensors.remove(name).unwrap()),
            Some(tensor) => drop(both.tensors.insert(name.to_owned(), tensor)),
        }
        both.save();
        let model = both.path("model");
        let image = both.path("no.png");
        let component =
            if name.starts_with("vae") { "vae, the tensors under" } else { "text_encoder_2, the tensors under" };
        for message in [
            both.on_file(1, &["convert"], &["--no-distill", "-o", text(&model)]),
            both.on_file(1, &["generate", "a red apple"], &["-o", text(&image)]),
        ] {
            assert!(
                message.contains(expected) && message.contains(component) && message.contains("one.safetensors"),
                "{message}"
            );
        }
        assert!(!model.exists() && !both.path("model.work").exists());
        if name.contains("strange") {
            both.on_file(0, &["convert", "--allow-unmatched"], &["--no-distill", "-o", text(&model)]);
        }
    }
}

#[test]
fn missing_components_are_asked_for() {
    let both = BothForms::new(&FLUX);
    let (file, config) = (both.path("one.safetensors"), both.path("folders/transformer/config.json"));
    let ask = |components: &[&str]| {
        let command = ["generate", text(&file), "a red apple", "--config", text(&config), "-o", "no.png"];
        stderr_of(1, &[&command[..], components].concat())
    };
    let message = ask(&[]);
    assert!(
        message.contains("num_attention_heads") && message.contains("config.json") && message.contains("--components"),
        "{message}"
    );
    let others = both.path("others");
    fs::remove_dir_all(others.join("tokenizer_2")).unwrap();
    let message = ask(&["--components", text(&others)]);
    assert!(message.contains("tokenizer_2 is missing") && message.contains("one.safetensors and"), "{message}");
}
