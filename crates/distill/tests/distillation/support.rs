//! The model of tests/fixtures/distill, batches of its fixture, and a small sample set.

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_distill::{
    Batch, DistillSettings, LearningRate, LossSettings, PairSpec, SampleSet, SampleSettings, SamplingSpec,
    TeacherStudent, Timesteps,
};
use clearform_models::families::flux::Flux;
use clearform_models::{Architecture, Conditions, ModelFamily as _, NoiseProcess, Prompt};
use clearform_sampling::{FlowMatchEuler, TorchGenerator};
use clearform_testkit::fixture;
use clearform_weights::{Checkpoint, InMemoryTensors, ProductPrecision};
use serde_json::Value;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// FLUX's noise process.
pub const FLOW: NoiseProcess = NoiseProcess::FlowMatching { time_scale: 1.0 };
pub const HEIGHT: usize = 4;
pub const WIDTH: usize = 6;
pub const TEXT: usize = 5;

pub fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/distill")
}

pub fn architecture() -> Box<dyn Architecture> {
    let config: Value = serde_json::from_slice(&std::fs::read(folder().join("config.json")).unwrap()).unwrap();
    Flux.parse(&config).unwrap()
}

pub fn weights(dtype: DType) -> InMemoryTensors {
    let checkpoint = Checkpoint::open(folder().join("weights.safetensors")).unwrap();
    InMemoryTensors::load(&checkpoint, Some(dtype), &Device::Cpu).unwrap()
}

pub fn models(plan: &str, dtype: DType) -> TeacherStudent {
    models_with(ProductPrecision::Full, plan, dtype)
}

pub fn models_with(products: ProductPrecision, plan: &str, dtype: DType) -> TeacherStudent {
    let plan: AttentionPlan = plan.parse().unwrap();
    let weights = weights(dtype);
    let architecture = architecture();
    let spec = PairSpec { architecture: architecture.as_ref(), plan: &plan, products };
    TeacherStudent::build(spec, &weights, &weights).unwrap()
}

pub fn image_ids() -> Tensor {
    let ids = (0..HEIGHT * WIDTH).flat_map(|token| [0.0, (token / WIDTH) as f32, (token % WIDTH) as f32]);
    Tensor::from_iter(ids, &Device::Cpu).unwrap().reshape((HEIGHT * WIDTH, 3)).unwrap()
}

pub fn text_ids() -> Tensor {
    Tensor::zeros((TEXT, 3), DType::F32, &Device::Cpu).unwrap()
}

pub fn steps() -> BTreeMap<String, Tensor> {
    fixture(folder().join("steps.safetensors"))
}

pub fn batch(steps: &BTreeMap<String, Tensor>, step: usize) -> Batch {
    let tensor = |name: &str| steps[&format!("{step}/{name}")].clone();
    let conditions = Conditions {
        text: Some(tensor("text")),
        pooled: Some(tensor("pooled")),
        image_ids: Some(image_ids()),
        text_ids: Some(text_ids()),
        ..Conditions::default()
    };
    Batch::noised(FLOW, &tensor("x0"), &tensor("noise"), &tensor("t"), conditions).unwrap()
}

/// The tensors of `steps` whose names start with `prefix`, without it.
pub fn with_prefix(steps: &BTreeMap<String, Tensor>, prefix: &str) -> BTreeMap<String, Tensor> {
    let stripped = steps.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)));
    stripped.map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect()
}

pub fn sample_settings() -> SampleSettings {
    let prompts = ["cat", "dog", "sun"].map(|prompt| Prompt::Text(prompt.to_owned())).to_vec();
    let size = [48, 32];
    SampleSettings { prompts, count: 7, batch: 3, size, steps: 2, guidance: None, classifier_free: None, seed: 5 }
}

/// Text features that depend on the prompt alone.
pub fn encode(prompts: &[Prompt]) -> Result<Conditions, Infallible> {
    let features = |prompt: &Prompt, shape: &[usize]| {
        let seed = prompt.to_string().bytes().map(u64::from).sum();
        TorchGenerator::new(seed).randn(shape).unwrap()
    };
    let rows = |shape: &[usize]| {
        Tensor::stack(&prompts.iter().map(|prompt| features(prompt, shape)).collect::<Vec<_>>(), 0).unwrap()
    };
    Ok(Conditions { text: Some(rows(&[TEXT, 16])), pooled: Some(rows(&[16])), ..Conditions::default() })
}

pub fn sampling_spec() -> SamplingSpec {
    SamplingSpec {
        shape: vec![HEIGHT * WIDTH, 8],
        image_ids: Some(image_ids()),
        text_ids: Some(text_ids()),
        schedule: FlowMatchEuler::default().schedule(2, HEIGHT * WIDTH).unwrap(),
        dtype: DType::F32,
        device: Device::Cpu,
    }
}

/// A complete set in `folder`.
pub fn sample_set(folder: &Path, settings: SampleSettings, models: &TeacherStudent) -> SampleSet {
    let set = SampleSet::create(folder, settings).unwrap();
    set.encode(&mut encode).unwrap();
    set.generate(models.teacher(), &sampling_spec(), &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert!(set.is_complete());
    set
}

pub fn settings() -> DistillSettings {
    DistillSettings {
        steps: 6,
        batch: 2,
        accumulation: 2,
        ema: Some(0.9),
        timesteps: Timesteps::LogitNormal { mean: 0.0, deviation: 1.0 },
        learning_rate: LearningRate { peak: 2e-3, warmup: 2, ..LearningRate::default() },
        loss: LossSettings { every: 2, ..LossSettings::default() },
        seed: 3,
        ..DistillSettings::default()
    }
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}
