//! mini-dit, distilled with the defaults, draws digits that read as its teacher's do.
//! `cargo test --release --workspace --test mini_dit -- --ignored --nocapture`
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use candle_core::{DType, Device, Tensor};
use clearform::evaluation::EvaluationRun;
use clearform::{ConvertOptions, ImageSize, Pipeline, PipelineOptions, Prompt, convert};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource as _};
use std::path::{Path, PathBuf};

/// Digits of each class.
const EACH: usize = 20;

fn assets(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/mini-dit").join(path)
}

/// The share of [`EACH`] digits of each class that the classifier of assets/mini-dit reads as their class.
fn read_rightly(model: &Path) -> f64 {
    let options = PipelineOptions { dtype: Some(DType::F32), ..PipelineOptions::default_options().unwrap() };
    let pipeline = Pipeline::open(model, options).unwrap();
    let classes: Vec<u32> = (0..10).flat_map(|class| [class; EACH]).collect();
    let evaluation = EvaluationRun {
        prompts: classes.iter().map(|class| Prompt::Class(*class)).collect(),
        size: ImageSize { height: 32, width: 32 },
        steps: 25,
        guidance: 2.0,
        seed: 2_000_000,
        control_images: Vec::new(),
    };
    let denoiser = pipeline.load_transformer(pipeline.plan(), Some(DType::F32)).unwrap();
    let drawn = evaluation.watched_latents(&pipeline, denoiser.as_ref(), &mut ()).unwrap();
    let read = classify(&drawn).unwrap();
    read.iter().zip(&classes).filter(|(read, class)| read == class).count() as f64 / classes.len() as f64
}

/// Two linear layers with a ReLU between them, on pictures averaged to 8 x 8.
fn classify(pictures: &Tensor) -> candle_core::Result<Vec<u32>> {
    let classifier = Checkpoint::open(assets("classifier.safetensors")).unwrap();
    let classifier = InMemoryTensors::load(&classifier, None, &Device::Cpu).unwrap();
    let weight = |name: &str| classifier.tensor(name).unwrap();
    let layer = |x: &Tensor, name: &str| {
        x.matmul(&weight(&format!("{name}.weight")).t()?)?.broadcast_add(&weight(&format!("{name}.bias")))
    };
    let inner = layer(&pictures.avg_pool2d(4)?.flatten_from(1)?, "0")?.relu()?;
    layer(&inner, "2")?.argmax(1)?.to_vec1()
}

#[test]
#[ignore = "takes minutes"]
fn the_defaults_repair_a_model_without_text() {
    let teacher = assets("model");
    let folder = tempfile::tempdir().unwrap();
    let wanted = read_rightly(&teacher);
    for radius in [4, 6] {
        let model = folder.path().join(format!("r{radius}"));
        let attention = format!("clear:r={radius}").parse().unwrap();
        let begun = std::time::Instant::now();
        let report = convert(&ConvertOptions { attention, ..ConvertOptions::new(&teacher, &model) }, &mut ()).unwrap();
        let seconds = begun.elapsed().as_secs_f64();
        let verdict = report.model.verdict.unwrap();
        let found = read_rightly(&model);
        println!("r = {radius}: {seconds:.0} s, reads {found:.3} of {wanted:.3}; {verdict}");
        assert!(verdict.left() <= 0.08, "r = {radius}: {} of the error is left", verdict.left());
        assert!(found >= wanted - 0.02, "r = {radius}: {found} is read rightly, of the teacher's {wanted}");
    }
}
