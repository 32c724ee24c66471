//! A family that the library does not know is added by a folder (this one), a line ([`FAMILIES`]) and a manifest
//! (toy.toml); no other crate changes. It is inspected, converted, distilled and draws.
#![allow(clippy::unwrap_used)]

mod family;

use candle_core::{DType, Device, Tensor};
use clearform::{
    ConvertOptions, FamilyRegistry, GenerateOptions, Prompt, SourceOptions, TrainingOptions, convert, generate, inspect,
};
use clearform_models::ModelFamily;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The line.
const FAMILIES: &[&dyn ModelFamily] = &[&family::Toy];

fn reading() -> SourceOptions {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/toy_family/toy.toml");
    SourceOptions { manifest: Some(manifest), families: FamilyRegistry::new(FAMILIES), ..SourceOptions::default() }
}

/// Weights of about unit gain, the same in every run: with random ones, an image is now and then a single colour, which is
/// refused.
fn checkpoint(folder: &Path) -> PathBuf {
    let weight = |seed: f32, rows: usize, columns: usize| {
        let values = (0..rows * columns).map(|index| 0.5 * (seed + 1.7 * index as f32).sin());
        Tensor::from_iter(values, &Device::Cpu).unwrap().reshape((rows, columns)).unwrap()
    };
    let tensors = HashMap::from([
        ("embed.weight", weight(1.0, 8, 1)),
        ("classes.weight", weight(2.0, 3, 8)),
        ("block.attn.to_q.weight", weight(3.0, 8, 8)),
        ("block.attn.to_k.weight", weight(4.0, 8, 8)),
        ("block.attn.to_v.weight", weight(5.0, 8, 8)),
        ("block.attn.to_out.weight", weight(6.0, 8, 8)),
        ("head.weight", weight(7.0, 1, 8)),
    ]);
    assert!(tensors.values().all(|tensor| tensor.dtype() == DType::F32));
    let path = folder.join("toy.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    path
}

#[test]
fn a_toy_family_is_converted_and_draws() {
    let folder = tempfile::tempdir().unwrap();
    let source = checkpoint(folder.path());
    let inspection = inspect(&source, &reading(), &mut ()).unwrap();
    assert!(inspection.is_complete(), "{inspection}");

    let output = folder.path().join("linear");
    let training = TrainingOptions {
        sample_count: Some(4),
        sample_steps: Some(2),
        steps: Some(8),
        batch: Some(2),
        ..Default::default()
    };
    let options = ConvertOptions {
        reading: reading(),
        attention: "clear:r=2".parse().unwrap(),
        training: Some(training),
        ..ConvertOptions::new(&source, &output)
    };
    let report = convert(&options, &mut ()).unwrap();
    assert_eq!((report.model.attention.as_str(), report.losses.len()), ("clear:r=2", 8));

    let draw = |model: &Path, attention: Option<&str>| {
        let options = GenerateOptions {
            reading: reading(),
            attention: attention.map(|plan| plan.parse().unwrap()),
            ..GenerateOptions::new(model, Prompt::Class(1))
        };
        generate(&options, &mut ()).unwrap().images.remove(0)
    };
    assert_eq!(draw(&output, None).dimensions(), (12, 12));
    assert_ne!(draw(&output, None), draw(&output, Some("full")), "the window changes nothing");
    let error = generate(&GenerateOptions::new(&source, Prompt::Class(1)), &mut ()).unwrap_err().to_string();
    assert!(error.contains("toy.safetensors: no supported model fits these tensors"), "{error}");
}
