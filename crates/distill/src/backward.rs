//! [`backward`]: losses and gradients of one batch, block by block.
//!
//! Forward keeps what enters each block and nothing inside it. Backward runs each block again, from the last to the
//! first, with the gradient of what came out of it: memory holds the activations of one block, whatever the depth.
//! Where memory is plenty, [`Activations::Keep`] keeps the inside too and saves the second run.

use crate::{Activations, Batch, LossSettings, Result, TeacherStudent};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Tensor, Var};
use clearform_attention::Attended;
use clearform_models::{Denoiser, DenoiserInput, HiddenState, without_variance};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Gradients of the trained parameters by name, f32.
pub type Gradients = BTreeMap<String, Tensor>;

/// The terms of the loss, each before its weight, and their weighted sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// Against what a perfect model predicts.
    pub denoising: f64,
    /// Against the teacher's prediction.
    pub prediction: f64,
    /// Against the teacher's attention outputs, the mean over the watched layers.
    pub attention: f64,
    /// What is minimised.
    pub total: f64,
}

/// Losses of `batch` and the gradients of their total. `activations` changes memory and time, not a bit of the result.
///
/// # Errors
/// The models or the tensor library refused.
pub fn backward(
    models: &TeacherStudent,
    batch: &Batch,
    settings: &LossSettings,
    activations: Activations,
) -> Result<(Losses, Gradients)> {
    let watched = settings.watched(models.student().layers())?;
    let targets = TeacherTargets::compute(models.teacher(), &batch.input, &watched)?;
    let (mut visits, last) = forward(models.student(), &batch.input, activations)?;
    let (losses, gradients) = (Losses::default(), BTreeMap::new());
    let mut pass = BackwardPass { models, settings, targets, watched: watched.len(), losses, gradients };
    let mut cotangent = pass.head(last, &batch.target)?;
    while let Some(visit) = visits.pop() {
        cotangent = pass.block(visits.len(), visit, &cotangent)?;
    }
    Ok((pass.losses, pass.gradients))
}

/// Mean squared difference of the predictions of two models on fixed inputs.
///
/// # Errors
/// A model refused, or no inputs.
pub fn prediction_error(teacher: &dyn Denoiser, student: &dyn Denoiser, inputs: &[DenoiserInput]) -> Result<f64> {
    let mut sum = 0.0;
    let mut count = 0;
    for input in inputs {
        let difference = (student.forward(input)?.detach() - teacher.forward(input)?.detach())?;
        sum += difference.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
        count += difference.elem_count();
    }
    Ok(sum / count.max(1) as f64)
}

/// What the teacher says of a batch.
struct TeacherTargets {
    prediction: Tensor,
    attention: BTreeMap<usize, Attended>,
}

impl TeacherTargets {
    fn compute(teacher: &dyn Denoiser, input: &DenoiserInput, watched: &[usize]) -> Result<Self> {
        let mut state = teacher.embed(input)?;
        let mut attention = BTreeMap::new();
        for index in 0..teacher.block_count() {
            state = teacher.block(index, state)?;
            if let Some(attended) = state.attention.take().filter(|_| watched.contains(&index)) {
                attention.insert(index, attended);
            }
        }
        Ok(Self { prediction: teacher.head(&state)?.to_dtype(DType::F32)?, attention })
    }
}

/// What is kept of a block from forward to backward.
enum SavedActivation {
    /// What entered; the block will run again.
    Entry(HiddenState),
    /// What entered and what came out, with the graph between.
    Whole(BlockInput, HiddenState),
}

/// A visit of each block, and what leaves the last, cut from the graph.
fn forward(
    student: &dyn Denoiser,
    input: &DenoiserInput,
    activations: Activations,
) -> Result<(Vec<SavedActivation>, HiddenState)> {
    let mut state = detached(student.embed(input)?);
    let mut visits = Vec::with_capacity(student.block_count());
    for index in 0..student.block_count() {
        let output = match activations {
            Activations::Recompute => {
                visits.push(SavedActivation::Entry(state.clone()));
                student.block(index, state)?
            }
            Activations::Keep => {
                let (inlet, entry) = BlockInput::before(index, state)?;
                let output = student.block(index, entry)?;
                visits.push(SavedActivation::Whole(inlet, output.clone()));
                output
            }
        };
        state = detached(output);
    }
    Ok((visits, state))
}

fn detached(state: HiddenState) -> HiddenState {
    let text = state.text.map(|text| text.detach());
    HiddenState { image: state.image.detach(), text, attention: None, context: state.context }
}

/// Gradients of the loss in what leaves a block; none where the loss does not depend on it.
struct OutputGradient {
    image: Option<Tensor>,
    text: Option<Tensor>,
}

impl OutputGradient {
    /// A scalar whose gradient in `output` is this one.
    fn product(&self, output: &HiddenState) -> Result<Tensor> {
        let mut sum = Tensor::zeros((), DType::F32, output.image.device())?;
        for (value, gradient) in [(Some(&output.image), &self.image), (output.text.as_ref(), &self.text)] {
            if let (Some(value), Some(gradient)) = (value, gradient) {
                sum = (sum + sum_of_rows(&(value * gradient)?)?)?;
            }
        }
        Ok(sum)
    }
}

/// What enters a block, as variables whose gradients can be asked for.
#[derive(Default)]
struct BlockInput {
    image: Option<Var>,
    text: Option<Var>,
}

impl BlockInput {
    /// The inlet of block `index`; nothing trained stands before the first.
    fn before(index: usize, entry: HiddenState) -> Result<(Self, HiddenState)> {
        if index == 0 { Ok((Self::default(), entry)) } else { Self::open(entry) }
    }

    fn open(entry: HiddenState) -> Result<(Self, HiddenState)> {
        let image = Var::from_tensor(&entry.image)?;
        let text = entry.text.as_ref().map(Var::from_tensor).transpose()?;
        let as_tensor = |var: &Var| var.as_tensor().clone();
        let state = HiddenState { image: as_tensor(&image), text: text.as_ref().map(as_tensor), ..entry };
        Ok((Self { image: Some(image), text }, state))
    }

    fn gradients(&self, store: &GradStore) -> OutputGradient {
        // What the store gives may hold the graph it came from.
        let take = |var: &Option<Var>| store.get(var.as_ref()?).map(Tensor::detach);
        OutputGradient { image: take(&self.image), text: take(&self.text) }
    }
}

/// A pass from head to embedding.
struct BackwardPass<'a> {
    models: &'a TeacherStudent,
    settings: &'a LossSettings,
    targets: TeacherTargets,
    watched: usize,
    losses: Losses,
    gradients: Gradients,
}

impl BackwardPass<'_> {
    fn head(&mut self, last: HiddenState, target: &Tensor) -> Result<OutputGradient> {
        let (inlet, state) = BlockInput::open(last)?;
        let prediction = self.models.student().head(&state)?.to_dtype(DType::F32)?;
        let flow = mean_square(&without_variance(&prediction, target)?, target)?;
        let taught = mean_square(&prediction, &self.targets.prediction)?;
        self.losses.denoising = scalar(&flow)?;
        self.losses.prediction = scalar(&taught)?;
        let loss = ((flow * self.settings.denoising)? + (taught * self.settings.prediction)?)?;
        self.losses.total = scalar(&loss)?;
        Ok(inlet.gradients(&loss.backward()?))
    }

    fn block(&mut self, index: usize, visit: SavedActivation, cotangent: &OutputGradient) -> Result<OutputGradient> {
        let (inlet, output) = match visit {
            SavedActivation::Whole(inlet, output) => (inlet, output),
            SavedActivation::Entry(entry) => {
                let (inlet, entry) = BlockInput::before(index, entry)?;
                (inlet, self.models.student().block(index, entry)?)
            }
        };
        let mut loss = cotangent.product(&output)?;
        if let (Some(taught), Some(own)) = (self.targets.attention.remove(&index), &output.attention) {
            let term = (attention_distance(own, &taught)? / self.watched as f64)?;
            self.losses.attention += scalar(&term)?;
            let weighted = (term * self.settings.attention)?;
            self.losses.total += scalar(&weighted)?;
            loss = (loss + weighted)?;
        }
        let store = loss.backward()?;
        self.collect(&store);
        Ok(inlet.gradients(&store))
    }

    fn collect(&mut self, store: &GradStore) {
        for (name, master) in self.models.masters() {
            if let Some(gradient) = store.get(master) {
                self.gradients.insert(name.clone(), gradient.detach());
            }
        }
    }
}

/// One mean over text and image rows together.
fn attention_distance(own: &Attended, taught: &Attended) -> Result<Tensor> {
    let mut sum = square_sum(&own.image, &taught.image)?;
    let mut count = own.image.elem_count();
    if let (Some(own), Some(taught)) = (&own.text, &taught.text) {
        sum = (sum + square_sum(own, taught)?)?;
        count += own.elem_count();
    }
    Ok((sum / count as f64)?)
}

fn square_sum(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    sum_of_rows(&(a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.sqr()?)
}

/// Row by row first: a GPU adds what goes into one number on one of its many processors.
fn sum_of_rows(x: &Tensor) -> candle_core::Result<Tensor> {
    x.sum(D::Minus1)?.to_dtype(DType::F32)?.sum_all()
}

fn mean_square(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    (a - b)?.sqr()?.mean_all()
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(f64::from(tensor.to_scalar::<f32>()?))
}
