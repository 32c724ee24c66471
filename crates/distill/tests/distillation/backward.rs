//! Backward block by block compared with one backward pass through the whole model, and the memory of teacher and student.

use crate::support::{architecture, batch, models, models_with, steps, values, weights};
use candle_core::{DType, Tensor};
use clearform_attention::{Attended, AttentionPlan};
use clearform_distill::{Activations, Batch, LossSettings, PairSpec, TeacherStudent, backward, prediction_error};
use clearform_models::{
    Architecture, Denoiser, DenoiserInput, DistilledLayer, HiddenState, InputChannels, PipelineSpec,
};
use clearform_testkit::{assert_close, relative_error};
use clearform_weights::{ProductPrecision, RawTensor, TensorInfo, TensorSource};
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
    let (teacher, teacher_attention) = run(models.teacher(), batch);
    let (student, student_attention) = run(models.student_with_gradients(), batch);
    let denoising = (square(&student, &batch.target) / student.elem_count() as f64).unwrap();
    let prediction = (square(&student, &teacher) / student.elem_count() as f64).unwrap();
    let mut loss = (denoising + (prediction * 0.5).unwrap()).unwrap();
    for (student, teacher) in student_attention.iter().zip(&teacher_attention) {
        let text = student.text.as_ref().unwrap();
        let sum = (square(&student.image, &teacher.image) + square(text, teacher.text.as_ref().unwrap())).unwrap();
        let count = student.image.elem_count() + text.elem_count();
        loss = (loss + (sum * (0.5 / count as f64 / student_attention.len() as f64)).unwrap()).unwrap();
    }
    loss
}

#[test]
fn block_by_block_is_plain_backward() {
    let models = models("clear:r=2,d=2", DType::F32);
    let layers = Some(models.student_with_gradients().layer_names().to_vec());
    let batch = batch(&steps(), 1);
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
    let models = models("clear:r=2,d=2", DType::F32);
    let batch = batch(&steps(), 2);
    let run = |activations| backward(&models, &batch, &LossSettings::default(), activations).unwrap();
    let (losses, gradients) = run(Activations::Recompute);
    let (kept_losses, kept) = run(Activations::Keep);
    assert_eq!(losses, kept_losses);
    assert_eq!(gradients.len(), models.masters().len());
    assert_eq!(gradients.len(), kept.len());
    for (name, gradient) in &gradients {
        assert_eq!(values(gradient), values(&kept[name]), "{name}");
    }
}

/// Gradients are rounded where the processor multiplies pairs of bf16; what is evaluated never is.
#[test]
fn products_in_bf16_keep_the_gradients() {
    let batch = batch(&steps(), 1);
    let [exact, rounded] = [ProductPrecision::Full, ProductPrecision::Bf16].map(|products| {
        let models = models_with(products, "clear:r=2,d=2", DType::F32);
        let error = prediction_error(models.teacher(), models.student(), std::slice::from_ref(&batch.input)).unwrap();
        let (losses, gradients) = backward(&models, &batch, &LossSettings::default(), Activations::Keep).unwrap();
        (error, losses, gradients)
    });
    assert_eq!(exact.0, rounded.0);
    assert!((exact.1.total - rounded.1.total).abs() < 1e-2 * exact.1.total);
    for (name, gradient) in &exact.2 {
        let error = relative_error(&rounded.2[name], gradient).unwrap();
        assert!(error < 2e-2, "{name}: {error:e}");
        assert_eq!(error > 1e-6, clearform_ops::has_bf16_products(), "{name}: {error:e}");
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

/// FLUX, recording the size of every tensor that it reads, by the address of its storage.
struct RecordingFlux {
    flux: Box<dyn Architecture>,
    held: Mutex<HashMap<usize, usize>>,
}

struct RecordingSource<'a>(&'a dyn TensorSource, &'a RecordingFlux);

impl TensorSource for RecordingSource<'_> {
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
        self.1.held.lock().unwrap().insert(address(&tensor), bytes(&tensor));
        Ok(tensor)
    }
}

impl Architecture for RecordingFlux {
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> clearform_models::Result<Box<dyn Denoiser>> {
        self.flux.build(&RecordingSource(source, self), plan)
    }
    fn parse_input(&self, tensors: BTreeMap<String, Tensor>) -> clearform_models::Result<DenoiserInput> {
        self.flux.parse_input(tensors)
    }
    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        self.flux.distilled_layers(layer)
    }
    fn input_channels(&self) -> InputChannels {
        self.flux.input_channels()
    }
    fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self.flux.pipeline_spec()
    }
}

fn address(tensor: &Tensor) -> usize {
    std::ptr::from_ref(&*tensor.storage_and_layout().0).addr()
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

#[test]
fn teacher_and_student_hold_the_frozen_weights_once() {
    let recording = RecordingFlux { flux: architecture(), held: Mutex::default() };
    let weights = weights(DType::BF16);
    let plan = "clear:r=2,d=2".parse().unwrap();
    let spec = PairSpec { architecture: &recording, plan: &plan, products: ProductPrecision::Full };
    let models = TeacherStudent::build(spec, &weights, &weights).unwrap();
    let model: usize = weights.iter().map(|(_, tensor)| bytes(tensor)).sum();
    let masters: usize = models.masters().values().map(|master| bytes(master)).sum();
    assert_eq!(recording.held.lock().unwrap().values().sum::<usize>(), model + masters);
    // 8 tensors in the double block, 6 in each single block, a spatial weight in each of the three.
    assert_eq!(models.masters().len(), 8 + 2 * 6 + 3);
    assert!(models.masters().values().all(|master| master.dtype() == DType::F32));
}

/// An earlier student's pooling weights belong to its projections, so both are taken from it.
#[test]
fn training_continues_from_all_weights_of_an_earlier_student() {
    let teacher = weights(DType::F32);
    let plan = "clear:r=2,d=2".parse().unwrap();
    let architecture = architecture();
    let spec = PairSpec { architecture: architecture.as_ref(), plan: &plan, products: ProductPrecision::Full };
    let first = TeacherStudent::build(spec, &teacher, &teacher).unwrap();
    let mut earlier = teacher.clone();
    for (name, master) in first.masters() {
        let is_pooling = name.ends_with(".processor.spatial_weight");
        assert_eq!(is_pooling, values(master).iter().all(|value| *value == 0.25), "initial value of {name}");
        earlier.insert(name.clone(), (master.as_tensor() + 0.5).unwrap());
    }
    let second = TeacherStudent::build(spec, &teacher, &earlier).unwrap();
    assert_eq!(second.masters().len(), first.masters().len());
    for (name, master) in second.masters() {
        let wanted = (first.masters()[name].as_tensor() + 0.5).unwrap();
        assert_eq!(values(master), values(&wanted), "{name}");
    }
}
