//! All-in-one files: the VAE and the text encoders that lie beside a transformer are what they would be in folders.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::{assemble_pipeline, fixture, seeded};
use clearform_weights::{InMemoryTensors, save};
use common::{complaint, json, repository, run, text};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

type Tensors = BTreeMap<String, Tensor>;

/// A pipeline of a family, and where files for ComfyUI have its parts.
struct Case {
    family: &'static str,
    layout: &'static str,
    parts: &'static [(&'static str, &'static str)],
}

const FLUX: Case = Case {
    family: "flux",
    layout: "comfy",
    parts: &[
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.t5xxl.transformer."),
        ("vae", "vae."),
    ],
};
const SD3: Case = Case {
    family: "sd3",
    layout: "comfy",
    parts: &[
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.clip_g.transformer."),
        ("text_encoder_3", "text_encoders.t5xxl.transformer."),
        ("vae", "first_stage_model."),
    ],
};
const PIXART: Case = Case {
    family: "pixart",
    layout: "original",
    parts: &[("text_encoder", "text_encoders.t5xxl.transformer."), ("vae", "first_stage_model.")],
};
/// A pipeline in folders, and the same with everything but tokenizers and scheduler in one file.
struct Both {
    folder: tempfile::TempDir,
    case: &'static Case,
    tensors: Tensors,
}

impl Both {
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

    fn part(&self, part: &str) -> PathBuf {
        let file = if part.starts_with("text") { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        self.path("folders").join(part).join(file)
    }

    /// Gives a text encoder of CLIP another projection.
    fn project(&self, part: &str, projection: Tensor) {
        let config = self.path("folders").join(part).join("config.json");
        let mut sizes: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        sizes["projection_dim"] = projection.dim(0).unwrap().into();
        fs::write(config, sizes.to_string()).unwrap();
        let mut tensors: HashMap<String, Tensor> = fixture(self.part(part)).into_iter().collect();
        tensors.insert("text_projection.weight".to_owned(), projection);
        candle_core::safetensors::save(&tensors, self.part(part)).unwrap();
    }

    fn in_one_file(mut self) -> Self {
        let (transformer, exported) = (self.path("folders/transformer"), self.path("exported.safetensors"));
        run(0, &["export", text(&transformer), "--to", self.case.layout, "-o", text(&exported)]);
        self.tensors = fixture(exported).into_iter().collect();
        for (part, prefix) in self.case.parts {
            let own = fixture(self.part(part)).into_iter();
            self.tensors.extend(own.map(|(name, tensor)| under(prefix, part, &name, tensor)));
        }
        self.put_what_comfy_adds();
        self.save();
        let others = self.path("others");
        copy(&self.path("folders"), &others);
        fs::remove_dir_all(others.join("transformer")).unwrap();
        for (part, _) in self.case.parts {
            fs::remove_file(others.join(part).join(self.part(part).file_name().unwrap())).unwrap();
        }
        self
    }

    fn put_what_comfy_adds(&mut self) {
        for (part, prefix) in self.case.parts.iter().filter(|(part, _)| *part != "vae") {
            let logit_scale = format!("{}logit_scale", prefix.strip_suffix("transformer.").unwrap());
            let one = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
            self.tensors.insert(logit_scale, one(&[]));
            if let Some(table) = self.tensors.get(&format!("{prefix}shared.weight")).cloned() {
                self.tensors.insert(format!("{prefix}encoder.embed_tokens.weight"), table);
            } else {
                self.tensors.insert(format!("{prefix}text_model.embeddings.position_ids"), one(&[1, 16]));
            }
            if *part == "text_encoder" && prefix.contains("clip_l") {
                self.tensors.insert(format!("{prefix}text_projection.weight"), one(&[6, 6]));
            }
        }
    }

    /// Writes the file from the tensors as they are now.
    fn save(&self) {
        let tensors: InMemoryTensors = self.tensors.clone().into_iter().collect();
        save(self.path("one.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    }

    /// Runs a command on the file; what the command needs beside it lies in folders.
    fn on_file(&self, code: i32, command: &[&str], further: &[&str]) -> String {
        let (file, others, config) =
            (self.path("one.safetensors"), self.path("others"), self.path("folders/transformer/config.json"));
        let beside = ["--components", text(&others), "--config", text(&config)];
        complaint(code, &[&command[..1], &[text(&file)], &command[1..], &beside, further].concat())
    }

    fn draw_file(&self) -> Vec<u8> {
        let picture = self.path("file.png");
        self.on_file(0, &["generate", "a red apple"], &[&DRAWING[..], &["-o", text(&picture)]].concat());
        pixels(&picture)
    }

    fn draw(&self, model: &Path) -> Vec<u8> {
        let picture = self.path("folder.png");
        run(0, &[&["generate", text(model), "a red apple", "-o", text(&picture)], &DRAWING[..]].concat());
        pixels(&picture)
    }
}

const DRAWING: [&str; 6] = ["--steps", "2", "--seed", "3", "--attention", "full"];

fn pixels(path: &Path) -> Vec<u8> {
    let pixels = image::open(path).unwrap().to_rgb8().into_raw();
    assert!(pixels.iter().any(|value| *value != pixels[0]), "the picture is blank");
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

/// A part's tensor as files for ComfyUI have it. What the authors of the VAE call it, diffusers' converter tells.
fn under(prefix: &str, part: &str, name: &str, tensor: Tensor) -> (String, Tensor) {
    if part != "vae" || name.contains("quant_conv") {
        return (format!("{prefix}{name}"), tensor);
    }
    let cases: Value =
        serde_json::from_slice(&fs::read(repository("tests/fixtures/component_shapes/vae.json")).unwrap()).unwrap();
    let line = cases[1]["tensors"].as_array().unwrap().iter().find(|line| line[2] == name).unwrap();
    let rank = line[1].as_array().unwrap().len();
    let shape = [tensor.dims(), &vec![1; rank - tensor.rank()]].concat();
    (format!("{prefix}{}", line[0].as_str().unwrap()), tensor.reshape(shape).unwrap())
}

fn equal(got: &Tensor, wanted: &Tensor) -> bool {
    let bits = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    (got.dims(), got.dtype(), bits(got)) == (wanted.dims(), wanted.dtype(), bits(wanted))
}

fn check(case: &'static Case) {
    let both = Both::new(case);
    let config = both.path("folders/transformer/config.json");
    let file = both.path("one.safetensors");
    let found = json(0, &["inspect", text(&file), "--config", text(&config)]);
    let names: Vec<&str> = case.parts.iter().map(|(part, _)| *part).collect();
    assert_eq!(found["parts"], serde_json::json!(names));
    assert_eq!(both.draw_file(), both.draw(&both.path("folders")), "{}", case.family);

    let model = both.path("model");
    both.on_file(0, &["convert"], &["--no-distill", "-o", text(&model)]);
    run(0, &["verify", text(&model)]);
    for (part, _) in case.parts {
        let name = both.part(part).file_name().unwrap().to_owned();
        let (got, wanted) = (fixture(model.join(part).join(&name)), fixture(both.part(part)));
        assert!(got.keys().eq(wanted.keys()), "{part}");
        assert!(got.iter().all(|(name, tensor)| equal(tensor, &wanted[name])), "{part}");
        let config = |folder: &str| -> Value {
            serde_json::from_slice(&fs::read(both.path(folder).join(part).join("config.json")).unwrap()).unwrap()
        };
        let (got, wanted) = (config("model"), config("folders"));
        let keys = wanted.as_object().unwrap().iter().filter(|(key, _)| got.get(*key).is_some());
        keys.for_each(|(key, value)| assert_eq!(&got[key], value, "{part}: {key}"));
    }
    assert_eq!(both.draw(&model), both.draw(&both.path("folders")));
}

#[test]
fn flux_in_one_file_is_flux() {
    check(&FLUX);
}

#[test]
fn sd3_in_one_file_is_sd3() {
    check(&SD3);
}

#[test]
fn pixart_in_one_file_is_pixart() {
    check(&PIXART);
}

#[test]
fn every_tensor_of_a_part_has_its_fate() {
    let both = Both::new(&FLUX);
    let (file, model, others) = (both.path("one.safetensors"), both.path("model"), both.path("others"));
    let config = both.path("folders/transformer/config.json");
    let convert = ["convert", text(&file), "-o", text(&model), "--no-distill", "--components", text(&others)];
    let report = json(0, &[&convert[..], &["--config", text(&config)]].concat());
    let told: usize =
        report["parts"].as_object().unwrap().values().map(|part| part["fates"].as_object().unwrap().len()).sum();
    let own = |name: &&String| FLUX.parts.iter().any(|(_, prefix)| name.starts_with(prefix));
    assert_eq!(told, both.tensors.keys().filter(own).count());
    let skipped = |load_report: &Value| -> Vec<String> {
        let outcomes = load_report["fates"].as_object().unwrap().iter();
        outcomes.filter(|(_, outcome)| !outcome["skipped"]["reason"].is_null()).map(|(name, _)| name.clone()).collect()
    };
    assert_eq!(skipped(&report["parts"]["vae"]), [""; 0]);
    assert_eq!(
        skipped(&report["parts"]["text_encoder"]),
        ["text_model.embeddings.position_ids", "text_projection.weight"]
    );
    assert_eq!(skipped(&report["parts"]["text_encoder_2"]), ["encoder.embed_tokens.weight"]);
    let of_transformer = skipped(&report["account"]);
    assert_eq!(of_transformer.len(), told + 2);
    assert_eq!(of_transformer.iter().filter(|name| name.ends_with("logit_scale")).count(), 2);
}

/// (stored in fp8, its scale), and what they stand for.
fn scaled(tensor: &Tensor) -> (Tensor, Tensor) {
    let stored = (tensor.to_dtype(DType::F32).unwrap() * 4.0).unwrap().to_dtype(DType::F8E4M3).unwrap();
    let product = (stored.to_dtype(DType::F32).unwrap() * 0.25).unwrap().to_dtype(DType::BF16).unwrap();
    (stored, product)
}

#[test]
fn text_encoders_in_scaled_fp8_are_multiplied_out_wherever_they_lie() {
    let mut both = Both::new(&FLUX);
    let prefix = FLUX.parts[1].1;
    let (mut folder, mut products) = (InMemoryTensors::default(), HashMap::new());
    for (name, tensor) in fixture(both.part("text_encoder_2")) {
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
    let path = both.part("text_encoder_2");
    let plain = both.draw(&both.path("folders"));
    candle_core::safetensors::save(&products, &path).unwrap();
    let wanted = both.draw(&both.path("folders"));
    assert_ne!(plain, wanted, "fp8 changes nothing");
    assert_eq!(both.draw_file(), wanted);
    save(&path, &folder, &BTreeMap::new()).unwrap();
    assert_eq!(both.draw(&both.path("folders")), wanted);
    let model = both.path("model");
    both.on_file(0, &["convert"], &["--no-distill", "-o", text(&model)]);
    let written = fixture(model.join("text_encoder_2/model.safetensors"));
    assert!(written.keys().eq(products.keys().collect::<std::collections::BTreeSet<_>>()));
    assert!(written.iter().all(|(name, tensor)| equal(tensor, &products[name])));

    folder.insert("encoder.block.0.layer.0.SelfAttention.k.weight_scale_inv", Tensor::new(1f32, &Device::Cpu).unwrap());
    save(&path, &folder, &BTreeMap::new()).unwrap();
    let said =
        complaint(1, &["generate", text(&both.path("folders")), "a red apple", "-o", text(&both.path("no.png"))]);
    assert!(said.contains("text_encoder_2") && said.contains("scaled by blocks"), "{said}");
}

#[test]
fn what_is_wrong_with_a_part_is_refused_by_name() {
    for (name, replaced, expected) in [
        ("vae.decoder.up.2.block.0.conv1.weight", None, "tensor \"decoder.up.2.block.0.conv1.weight\" is missing"),
        ("vae.encoder.conv_in.bias", Some(Tensor::zeros(5, DType::BF16, &Device::Cpu).unwrap()), "wrong shape"),
        (
            "text_encoders.t5xxl.transformer.encoder.strange",
            Some(Tensor::zeros(5, DType::BF16, &Device::Cpu).unwrap()),
            "tensor \"encoder.strange\" is not understood",
        ),
    ] {
        let mut both = Both::new(&FLUX);
        match replaced {
            None => drop(both.tensors.remove(name).unwrap()),
            Some(tensor) => drop(both.tensors.insert(name.to_owned(), tensor)),
        }
        both.save();
        let (model, picture) = (both.path("model"), both.path("no.png"));
        let part = if name.starts_with("vae") { "vae, the tensors under" } else { "text_encoder_2, the tensors under" };
        for said in [
            both.on_file(1, &["convert"], &["--no-distill", "-o", text(&model)]),
            both.on_file(1, &["generate", "a red apple"], &["-o", text(&picture)]),
        ] {
            assert!(said.contains(expected) && said.contains(part) && said.contains("one.safetensors"), "{said}");
        }
        assert!(!model.exists() && !both.path("model.work").exists());
        if name.contains("strange") {
            both.on_file(0, &["convert", "--allow-unmatched"], &["--no-distill", "-o", text(&model)]);
        }
    }
}

#[test]
fn what_no_file_holds_is_asked_for() {
    let both = Both::new(&FLUX);
    let (file, config) = (both.path("one.safetensors"), both.path("folders/transformer/config.json"));
    let ask = |components: &[&str]| {
        let command = ["generate", text(&file), "a red apple", "--config", text(&config), "-o", "no.png"];
        complaint(1, &[&command[..], components].concat())
    };
    let said = ask(&[]);
    assert!(
        said.contains("num_attention_heads") && said.contains("config.json") && said.contains("--components"),
        "{said}"
    );
    let others = both.path("others");
    fs::remove_dir_all(others.join("tokenizer_2")).unwrap();
    let said = ask(&["--components", text(&others)]);
    assert!(said.contains("tokenizer_2 is missing") && said.contains("one.safetensors and"), "{said}");
}
