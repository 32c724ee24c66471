//! The model of tests/fixtures/distill, and batches of its fixture.

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_distill::{Batch, PairSpec, TeacherStudent};
use clearform_models::families::flux::Flux;
use clearform_models::{Conditions, NoiseProcess};
use clearform_testkit::fixture;
use clearform_weights::{Checkpoint, InMemoryTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// FLUX's.
pub const FLOW: NoiseProcess = NoiseProcess::FlowMatching { time_scale: 1.0 };
pub const HEIGHT: usize = 4;
pub const WIDTH: usize = 6;
pub const TEXT: usize = 5;

pub fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/distill")
}

pub fn config() -> Value {
    serde_json::from_slice(&std::fs::read(folder().join("config.json")).unwrap()).unwrap()
}

pub fn weights(dtype: DType) -> InMemoryTensors {
    let checkpoint = Checkpoint::open(folder().join("weights.safetensors")).unwrap();
    InMemoryTensors::load(&checkpoint, Some(dtype), &Device::Cpu).unwrap()
}

pub fn models(plan: &str, dtype: DType) -> TeacherStudent {
    let (weights, plan): (_, AttentionPlan) = (weights(dtype), plan.parse().unwrap());
    TeacherStudent::build(PairSpec { family: &Flux, config: &config(), plan: &plan }, &weights, &weights).unwrap()
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
    let part = |name: &str| steps[&format!("{step}/{name}")].clone();
    let conditions = Conditions {
        text: Some(part("text")),
        pooled: Some(part("pooled")),
        image_ids: Some(image_ids()),
        text_ids: Some(text_ids()),
        ..Conditions::default()
    };
    Batch::noised(FLOW, &part("x0"), &part("noise"), &part("t"), conditions).unwrap()
}

/// Tensors of `steps` below `prefix`, without it.
pub fn below(steps: &BTreeMap<String, Tensor>, prefix: &str) -> BTreeMap<String, Tensor> {
    let stripped = steps.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)));
    stripped.map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect()
}
