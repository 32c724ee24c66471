//! All-in-one files: a VAE and text encoders in the transformer's file work as they do in folders.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::{assemble_pipeline, fixture, seeded};
use clearform_weights::{InMemoryTensors, save};
use common::{json, repository, run, stderr_of, text};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

type Tensors = BTreeMap<String, Tensor>;

/// A pipeline of a family, and the prefixes of its components in files for ComfyUI.
struct Case {
    family: &'static str,
    layout: &'static str,
    components: &'static [(&'static str, &'static str)],
}

const FLUX: Case = Case {
    family: "flux",
    layout: "comfy",
    components: &[
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.t5xxl.transformer."),
        ("vae", "vae."),
    ],
};
const SD3: Case = Case {
    family: "sd3",
    layout: "comfy",
    components: &[
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.clip_g.transformer."),
        ("text_encoder_3", "text_encoders.t5xxl.transformer."),
        ("vae", "first_stage_model."),
    ],
};
const PIXART: Case = Case {
    family: "pixart",
    layout: "original",
    components: &[("text_encoder", "text_encoders.t5xxl.transformer."), ("vae", "first_stage_model.")],
};

/// A pipeline in folders, and the same with everything except tokenizers and scheduler in one file.
struct BothForms {
    folder: tempfile::TempDir,
    case: &'static Case,
    tensors: Tensors,
}

impl BothForms {
    fn new(case: &'static Case) -> Self {
        let both = Self { folder: tempfile::tempdir().unwrap(), case, tensors: Tensors::new() };
        match case.family {
            "flux" => copy(&repository("assets/mini-flux/base"), &both.path("folders")),
            family => assemble_pipeline(&repository(""), family, &both.path("folders")),
        }
        if case.family == "sd3" {
            both.project("text_encoder", Tensor::eye(6, DType::F32, &Device::Cpu).unwrap());
            both.project("text_encoder_2", seeded("text_projection.weight", &[6, 8], "projected/"));
        }
        both.in_one_file()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The weights of a component in the folders.
    fn weights(&self, component: &str) -> PathBuf {
        let file =
            if component.starts_with("text") { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        self.path("folders").join(component).join(file)
    }

    /// Replaces the projection of a CLIP text encoder.
    fn project(&self, component: &str, projection: Tensor) {
        let config = self.path("folders").join(component).join("config.json");
        let mut sizes: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        sizes["projection_dim"] = projection.dim(0).unwrap().into();
        fs::write(config, sizes.to_string()).unwrap();
        let mut tensors: HashMap<String, Tensor> = fixture(self.weights(component)).into_iter().collect();
        tensors.insert("text_projection.weight".to_owned(), projection);
        candle_core::safetensors::save(&tensors, self.weights(component)).unwrap();
    }

    /// Writes the single file, and the folder `others` with what it lacks.
    fn in_one_file(mut self) -> Self {
        let transformer = self.path("folders/transformer");
        let exported = self.path("exported.safetensors");
        run(0, &["export", text(&transformer), "--to", self.case.layout, "-o", text(&exported)]);
        self.tensors = fixture(exported).into_iter().collect();
        for (component, prefix) in self.case.components {
            let tensors = fixture(self.weights(component)).into_iter();
            self.tensors.extend(tensors.map(|(name, tensor)| as_in_comfyui(prefix, component, &name, tensor)));
        }
        self.add_unused_tensors();
        self.save();
        let others = self.path("others");
        copy(&self.path("folders"), &others);
        fs::remove_dir_all(others.join("transformer")).unwrap();
        for (component, _) in self.case.components {
            fs::remove_file(others.join(component).join(self.weights(component).file_name().unwrap())).unwrap();
        }
        self
    }

    /// Adds the tensors that ComfyUI's files have and diffusers' text encoders do not use.
    fn add_unused_tensors(&mut self) {
        for (component, prefix) in self.case.components.iter().filter(|(component, _)| *component != "vae") {
            let logit_scale = format!("{}logit_scale", prefix.strip_suffix("transformer.").unwrap());
            let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
            self.tensors.insert(logit_scale, ones(&[]));
            if let Some(table) = self.tensors.get(&format!("{prefix}shared.weight")).cloned() {
                self.tensors.insert(format!("{prefix}encoder.embed_tokens.weight"), table);
            } else {
                self.tensors.insert(format!("{prefix}text_model.embeddings.position_ids"), ones(&[1, 16]));
            }
            if *component == "text_encoder" && prefix.contains("clip_l") {
                self.tensors.insert(format!("{prefix}text_projection.weight"), ones(&[6, 6]));
            }
        }
    }

    /// Writes the current tensors to the single file.
    fn save(&self) {
        let tensors: InMemoryTensors = self.tensors.clone().into_iter().collect();
        save(self.path("one.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    }

    /// Runs a command on the single file, with the folder `others` as --components. Returns stderr.
    fn on_file(&self, code: i32, command: &[&str], further: &[&str]) -> String {
        let file = self.path("one.safetensors");
        let others = self.path("others");
        let config = self.path("folders/transformer/config.json");
        let reading = ["--components", text(&others), "--config", text(&config)];
        stderr_of(code, &[&command[..1], &[text(&file)], &command[1..], &reading, further].concat())
    }

    fn generate_from_file(&self) -> Vec<u8> {
        let image = self.path("file.png");
        self.on_file(0, &["generate", "a red apple"], &[&SAMPLING[..], &["--overwrite", "-o", text(&image)]].concat());
        pixels(&image)
    }

    fn generate(&self, model: &Path) -> Vec<u8> {
        let image = self.path("folder.png");
        run(0, &[&["generate", text(model), "a red apple", "--overwrite", "-o", text(&image)], &SAMPLING[..]].concat());
        pixels(&image)
    }
}

const SAMPLING: [&str; 6] = ["--steps", "2", "--seed", "3", "--attention", "full"];

fn pixels(path: &Path) -> Vec<u8> {
    let pixels = image::open(path).unwrap().to_rgb8().into_raw();
    assert!(pixels.iter().any(|value| *value != pixels[0]), "the image is blank");
    pixels
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)
        } else {
            assert!(fs::copy(entry.path(), &target).unwrap() > 0)
        }
    }
}

/// A component's tensor as in files for ComfyUI. The VAE's names there are in the table of diffusers' converter.
fn as_in_comfyui(prefix: &str, component: &str, name: &str, tensor: Tensor) -> (String, Tensor) {
    if component != "vae" || name.contains("quant_conv") {
        return (format!("{prefix}{name}"), tensor);
    }
    let cases: Value =
        serde_json::from_slice(&fs::read(repository("tests/fixtures/component_shapes/vae.json")).unwrap()).unwrap();
    let line = cases[1]["tensors"].as_array().unwrap().iter().find(|line| line[2] == name).unwrap();
    let rank = line[1].as_array().unwrap().len();
    let shape = [tensor.dims(), &vec![1; rank - tensor.rank()]].concat();
    (format!("{prefix}{}", line[0].as_str().unwrap()), tensor.reshape(shape).unwrap())
}

fn same_bits(got: &Tensor, wanted: &Tensor) -> bool {
    let bits = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    (got.dims(), got.dtype(), bits(got)) == (wanted.dims(), wanted.dtype(), bits(wanted))
}

fn check(case: &'static Case) {
    let both = BothForms::new(case);
    let config = both.path("folders/transformer/config.json");
    let file = both.path("one.safetensors");
    let found = json(0, &["inspect", text(&file), "--config", text(&config)]);
    let names: Vec<&str> = case.components.iter().map(|(component, _)| *component).collect();
    assert_eq!(found["components"], serde_json::json!(names));
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
