//! [`assemble_pipeline`]: whole model folders in diffusers' layout, from the small files of the fixtures.

use crate::seeded;
use candle_core::Tensor;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

type Shapes = BTreeMap<String, BTreeMap<String, Vec<usize>>>;

const CONFIGS: [&str; 2] = ["config.json", "scheduler_config.json"];
/// For each pipeline: the folders of mini-flux's tokenizers, and their names in the pipeline.
const TOKENIZERS: &[(&str, &[(&str, &str)])] = &[
    ("pixart", &[("tokenizer_2", "tokenizer")]),
    ("sd3", &[("tokenizer", "tokenizer"), ("tokenizer", "tokenizer_2"), ("tokenizer_2", "tokenizer_3")]),
];

/// Writes the pipeline `name` of tests/fixtures/pipelines to the folder `target` in diffusers' layout: configs from the
/// fixture, seeded weights, and tokenizers of assets/mini-flux. `repository` is the root of the repository.
///
/// # Panics
/// A fixture is missing, or a file cannot be written.
pub fn assemble_pipeline(repository: &Path, name: &str, target: &Path) {
    let fixture = repository.join("tests/fixtures/pipelines").join(name);
    copy(&fixture.join("model_index.json"), &target.join("model_index.json"));
    let index: Value = read(&fixture.join("model_index.json"));
    for component in index.as_object().into_iter().flat_map(|components| components.keys()) {
        for config in CONFIGS.iter().filter(|config| fixture.join(component).join(config).exists()) {
            copy(&fixture.join(component).join(config), &target.join(component).join(config));
        }
    }
    let shapes: Shapes = read(&fixture.join("shapes.json"));
    for (component, shapes) in shapes {
        let salt = format!("{component}/");
        let tensor = |(name, shape): (String, Vec<usize>)| (name.clone(), seeded(&name, &shape, &salt));
        let weights: HashMap<String, Tensor> = shapes.into_iter().map(tensor).collect();
        let file =
            if component.starts_with("text") { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        let path = target.join(&component).join(file);
        candle_core::safetensors::save(&weights, &path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    for (from, to) in TOKENIZERS.iter().filter(|(pipeline, _)| *pipeline == name).flat_map(|(_, names)| *names) {
        copy_folder(&repository.join("assets/mini-flux/base").join(from), &target.join(to));
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("fixture {}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("fixture {}: {error}", path.display()))
}

fn copy(from: &Path, to: &Path) {
    let copied = to.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::copy(from, to));
    copied.unwrap_or_else(|error| panic!("{}: {error}", from.display()));
}

fn copy_folder(from: &Path, to: &Path) {
    let entries = std::fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    for entry in entries.flatten() {
        copy(&entry.path(), &to.join(entry.file_name()));
    }
}
