//! Pipelines in folders, and the same in one file.

use super::{repository, run, stderr_of, text};
use candle_core::{DType, Device, Tensor};
use clearform_testkit::{assemble_pipeline, fixture, seeded};
use clearform_weights::{InMemoryTensors, save};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

pub type Tensors = BTreeMap<String, Tensor>;

/// A pipeline of a family, and the prefixes of its components in files for ComfyUI.
pub struct Case {
    pub family: &'static str,
    pub layout: &'static str,
    pub components: &'static [(&'static str, &'static str)],
}

pub const FLUX: Case = Case {
    family: "flux",
    layout: "comfy",
    components: &[
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.t5xxl.transformer."),
        ("vae", "vae."),
    ],
};
pub const SD3: Case = Case {
    family: "sd3",
    layout: "comfy",
    components: &[
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.clip_g.transformer."),
        ("text_encoder_3", "text_encoders.t5xxl.transformer."),
        ("vae", "first_stage_model."),
    ],
};
pub const PIXART: Case = Case {
    family: "pixart",
    layout: "original",
    components: &[("text_encoder", "text_encoders.t5xxl.transformer."), ("vae", "first_stage_model.")],
};

/// A pipeline in folders, and the same with everything except tokenizers and scheduler in one file.
pub struct BothForms {
    pub folder: tempfile::TempDir,
    pub case: &'static Case,
    pub tensors: Tensors,
}

impl BothForms {
    pub fn new(case: &'static Case) -> Self {
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

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The weights of a component in the folders.
    pub fn weights(&self, component: &str) -> PathBuf {
        let file =
            if component.starts_with("text") { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        self.path("folders").join(component).join(file)
    }

    /// Replaces the projection of a CLIP text encoder.
    pub fn project(&self, component: &str, projection: Tensor) {
        let config = self.path("folders").join(component).join("config.json");
        let mut sizes: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        sizes["projection_dim"] = projection.dim(0).unwrap().into();
        fs::write(config, sizes.to_string()).unwrap();
        let mut tensors: HashMap<String, Tensor> = fixture(self.weights(component)).into_iter().collect();
        tensors.insert("text_projection.weight".to_owned(), projection);
        candle_core::safetensors::save(&tensors, self.weights(component)).unwrap();
    }

    /// Writes the single file, and the folder `others` with what it lacks.
    pub fn in_one_file(mut self) -> Self {
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
    pub fn add_unused_tensors(&mut self) {
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
    pub fn save(&self) {
        let tensors: InMemoryTensors = self.tensors.clone().into_iter().collect();
        save(self.path("one.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    }

    /// Runs a command on the single file, with the folder `others` as --components. Returns stderr.
    pub fn on_file(&self, code: i32, command: &[&str], further: &[&str]) -> String {
        let file = self.path("one.safetensors");
        let others = self.path("others");
        let config = self.path("folders/transformer/config.json");
        let reading = ["--components", text(&others), "--config", text(&config)];
        stderr_of(code, &[&command[..1], &[text(&file)], &command[1..], &reading, further].concat())
    }

    pub fn generate_from_file(&self) -> Vec<u8> {
        let image = self.path("file.png");
        self.on_file(0, &["generate", "a red apple"], &[&SAMPLING[..], &["--overwrite", "-o", text(&image)]].concat());
        pixels(&image)
    }

    pub fn generate(&self, model: &Path) -> Vec<u8> {
        let image = self.path("folder.png");
        run(0, &[&["generate", text(model), "a red apple", "--overwrite", "-o", text(&image)], &SAMPLING[..]].concat());
        pixels(&image)
    }
}

pub const SAMPLING: [&str; 6] = ["--steps", "2", "--seed", "3", "--attention", "full"];

pub fn pixels(path: &Path) -> Vec<u8> {
    let pixels = image::open(path).unwrap().to_rgb8().into_raw();
    assert!(pixels.iter().any(|value| *value != pixels[0]), "the image is blank");
    pixels
}

pub fn copy(from: &Path, to: &Path) {
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
pub fn as_in_comfyui(prefix: &str, component: &str, name: &str, tensor: Tensor) -> (String, Tensor) {
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

pub fn same_bits(got: &Tensor, wanted: &Tensor) -> bool {
    let bits = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    (got.dims(), got.dtype(), bits(got)) == (wanted.dims(), wanted.dtype(), bits(wanted))
}
