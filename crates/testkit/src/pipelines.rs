//! [`assemble_pipeline`]: whole model folders out of small files.

use crate::seeded;
use candle_core::Tensor;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

type Shapes = BTreeMap<String, BTreeMap<String, Vec<usize>>>;

const CONFIGS: [&str; 2] = ["config.json", "scheduler_config.json"];
/// Which of mini-flux's tokenizers a pipeline has, and under which names.
const TOKENIZERS: &[(&str, &[(&str, &str)])] = &[
    ("pixart", &[("tokenizer_2", "tokenizer")]),
    ("sd3", &[("tokenizer", "tokenizer"), ("tokenizer", "tokenizer_2"), ("tokenizer_2", "tokenizer_3")]),
];

/// Puts the pipeline `name` of tests/fixtures/pipelines together in the folder `target`, as diffusers would have it:
/// configs from the fixture, seeded weights, and tokenizers of assets/mini-flux. `repository` is where both lie.
///
/// # Panics
/// The files are not those of the repository, or the system refuses.
pub fn assemble_pipeline(repository: &Path, name: &str, target: &Path) {
    let fixture = repository.join("tests/fixtures/pipelines").join(name);
    copy(&fixture.join("model_index.json"), &target.join("model_index.json"));
    let parts: Value = read(&fixture.join("model_index.json"));
    for part in parts.as_object().into_iter().flat_map(|parts| parts.keys()) {
        for config in CONFIGS.iter().filter(|config| fixture.join(part).join(config).exists()) {
            copy(&fixture.join(part).join(config), &target.join(part).join(config));
        }
    }
    let shapes: Shapes = read(&fixture.join("shapes.json"));
    for (part, shapes) in shapes {
        let tensor = |(name, shape): (String, Vec<usize>)| (name.clone(), seeded(&name, &shape, &format!("{part}/")));
        let weights: HashMap<String, Tensor> = shapes.into_iter().map(tensor).collect();
        let file = if part.starts_with("text") { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        let path = target.join(&part).join(file);
        candle_core::safetensors::save(&weights, &path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    for (from, to) in TOKENIZERS.iter().filter(|(of, _)| *of == name).flat_map(|(_, names)| *names) {
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
