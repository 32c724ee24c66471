//! Backward block by block against one backward through everything, and what teacher and student hold.

use crate::support::{batch, config, models, steps, weights};
use candle_core::{DType, Tensor, TensorId};
use clearform_attention::{Attended, AttentionPlan};
use clearform_distill::{Activations, Batch, LossSettings, PairSpec, TeacherStudent, backward, prediction_error};
use clearform_models::families::flux::Flux;
use clearform_models::text::TextEncoders;
use clearform_models::{
    Conditions, Denoiser, DenoiserInput, DistilledLayer, Family, GuidanceKind, HiddenState, InputChannels,
    NoiseProcess, Prompt,
};
use clearform_testkit::assert_close;
use clearform_weights::{RawTensor, TensorInfo, TensorSource};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

fn run(model: &dyn Denoiser, batch: &Batch) -> (Tensor, Vec<Attended>) {
    let mut state: HiddenState = model.embed(&batch.input).unwrap();
    let mut attention = Vec::new();
    for index in 0..model.block_count() {
        state = model.block(index, state).unwrap();
        attention.push(state.attention.clone().unwrap());
    }
    (model.head(&state).unwrap(), attention)
}

fn square(a: &Tensor, b: &Tensor) -> Tensor {
    (a - b).unwrap().sqr().unwrap().sum_all().unwrap()
}

/// The total loss with every layer watched, in one graph.
fn plain_loss(models: &TeacherStudent, batch: &Batch) -> Tensor {
    let (taught, taught_attention) = run(models.teacher(), batch);
    let (own, own_attention) = run(models.student(), batch);
    let flow = (square(&own, &batch.target) / own.elem_count() as f64).unwrap();
    let prediction = (square(&own, &taught) / own.elem_count() as f64).unwrap();
    let mut loss = (flow + (prediction * 0.5).unwrap()).unwrap();
    for (own, taught) in own_attention.iter().zip(&taught_attention) {
        let (text, taught_text) = (own.text.as_ref().unwrap(), taught.text.as_ref().unwrap());
        let sum = (square(&own.image, &taught.image) + square(text, taught_text)).unwrap();
        let count = own.image.elem_count() + text.elem_count();
        loss = (loss + (sum * (0.5 / count as f64 / own_attention.len() as f64)).unwrap()).unwrap();
    }
    loss
}

#[test]
fn block_by_block_is_plain_backward() {
    let (steps, models) = (steps(), models("clear:r=2,d=2", DType::F32));
    let layers = Some(models.student().layers().to_vec());
    let batch = batch(&steps, 1);
    let plain = plain_loss(&models, &batch);
    let loss = LossSettings { layers, ..LossSettings::default() };
    let (losses, gradients) = backward(&models, &batch, &loss, Activations::Recompute).unwrap();
    let plain_total = f64::from(plain.to_scalar::<f32>().unwrap());
    assert!((losses.total - plain_total).abs() < 1e-5 * plain_total, "{} and {plain_total}", losses.total);
    let store = plain.backward().unwrap();
    assert_eq!(gradients.len(), models.masters().len());
    for (name, master) in models.masters() {
        assert_close(name, &gradients[name], &store.get(master).unwrap().detach(), 1e-5);
    }
}

#[test]
fn keeping_activations_changes_no_bit() {
    let (steps, models) = (steps(), models("clear:r=2,d=2", DType::F32));
    let run = |activations| backward(&models, &batch(&steps, 2), &LossSettings::default(), activations).unwrap();
    let ((losses, gradients), (kept_losses, kept)) = (run(Activations::Recompute), run(Activations::Keep));
    assert_eq!(losses, kept_losses);
    assert_eq!(gradients.len(), kept.len());
    for (name, gradient) in &gradients {
        let numbers = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(numbers(gradient), numbers(&kept[name]), "{name}");
    }
}

#[test]
fn a_student_with_full_attention_is_its_teacher() {
    let models = models("full", DType::BF16);
    let batch = batch(&steps(), 0);
    let error = prediction_error(models.teacher(), models.student(), std::slice::from_ref(&batch.input)).unwrap();
    assert!(error < 1e-12, "{error}");
    let linear = crate::support::models("clear:r=2", DType::BF16);
    let error = prediction_error(linear.teacher(), linear.student(), &[batch.input]).unwrap();
    assert!((error - 0.108_92).abs() < 2e-4, "{error}");
}

/// FLUX that notes which tensors are asked for.
#[derive(Default)]
struct Spy {
    held: Mutex<HashMap<TensorId, usize>>,
}

struct Watched<'a>(&'a dyn TensorSource, &'a Spy);

impl TensorSource for Watched<'_> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.tensors()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.info(name)
    }
    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        self.0.read(name)
    }
    fn tensor(&self, name: &str) -> clearform_weights::Result<Tensor> {
        let tensor = self.0.tensor(name)?;
        self.1.held.lock().unwrap().insert(tensor.id(), bytes(&tensor));
        Ok(tensor)
    }
}

impl Family for Spy {
    fn name(&self) -> &'static str {
        Flux.name()
    }
    fn build(
        &self,
        config: &Value,
        source: &dyn TensorSource,
        plan: &AttentionPlan,
    ) -> clearform_models::Result<Box<dyn Denoiser>> {
        Flux.build(config, &Watched(source, self), plan)
    }
    fn input(&self, tensors: BTreeMap<String, Tensor>) -> clearform_models::Result<DenoiserInput> {
        Flux.input(tensors)
    }
    fn distilled(&self, layer: &str) -> Vec<DistilledLayer> {
        Flux.distilled(layer)
    }
    fn channels(&self, config: &Value) -> clearform_models::Result<InputChannels> {
        Flux.channels(config)
    }
    fn noise_process(&self) -> NoiseProcess {
        Flux.noise_process()
    }
    fn guidance_kind(&self, config: &Value) -> clearform_models::Result<GuidanceKind> {
        Flux.guidance_kind(config)
    }
    fn patch(&self, config: &Value) -> clearform_models::Result<usize> {
        Flux.patch(config)
    }
    fn sample_size(&self, config: &Value) -> clearform_models::Result<Option<usize>> {
        Flux.sample_size(config)
    }
    fn encode(
        &self,
        config: &Value,
        prompts: &[Prompt],
        encoders: &dyn TextEncoders,
    ) -> clearform_models::Result<Conditions> {
        Flux.encode(config, prompts, encoders)
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

#[test]
fn teacher_and_student_hold_the_frozen_weights_once() {
    let (spy, weights) = (Spy::default(), weights(DType::BF16));
    let plan = "clear:r=2,d=2".parse().unwrap();
    let models =
        TeacherStudent::build(PairSpec { family: &spy, config: &config(), plan: &plan }, &weights, &weights).unwrap();
    let model: usize = weights.iter().map(|(_, tensor)| bytes(tensor)).sum();
    let masters: usize = models.masters().values().map(|master| bytes(master)).sum();
    assert_eq!(spy.held.lock().unwrap().values().sum::<usize>(), model + masters);
    // 8 tensors in the double block, 6 in each single block, a spatial weight in each of the three.
    assert_eq!(models.masters().len(), 8 + 2 * 6 + 3);
    assert!(models.masters().values().all(|master| master.dtype() == DType::F32));
}
