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

fn checkpoint(folder: &Path) -> PathBuf {
    let random = |rows: usize, columns: usize| Tensor::randn(0f32, 0.5, (rows, columns), &Device::Cpu).unwrap();
    let square = || random(8, 8);
    let tensors = HashMap::from([
        ("embed.weight", random(8, 1)),
        ("classes.weight", random(3, 8)),
        ("block.attn.to_q.weight", square()),
        ("block.attn.to_k.weight", square()),
        ("block.attn.to_v.weight", square()),
        ("block.attn.to_out.weight", square()),
        ("head.weight", random(1, 8)),
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
    let training = TrainingOptions { sample_count: 4, sample_steps: Some(2), steps: 8, batch: 2, ..Default::default() };
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
    assert!(error.contains("no supported model fits these tensors"), "{error}");
}
