//! [`backward()`]: losses and gradients of one batch, block by block.
//!
//! This is `torch.utils.checkpoint` around every block. Forward keeps only the input of each block. Backward runs each block
//! again, from the last to the first, with the gradient of its output, so memory holds the activations of one block
//! whatever the depth. With enough memory [`Activations::Keep`] keeps the activations and saves the second run.

use crate::{Activations, Batch, LossSettings, Result, TeacherStudent};
use candle_core::backend::{BackendDevice as _, BackendStorage as _};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, DType, Layout, Shape, Tensor, Var};
use clearform_attention::Attended;
use clearform_models::{Denoiser, DenoiserInput, HiddenState, without_variance};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Gradients of the trained parameters by name, f32.
pub type Gradients = BTreeMap<String, Tensor>;

/// The terms of the loss, each before its weight, and their weighted sum (CLEAR, equation 6).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// Mean squared error of the student's prediction against the target that a perfect model predicts. Logs of earlier
    /// versions call it `flow`.
    #[serde(alias = "flow")]
    pub denoising: f64,
    /// Mean squared error against the teacher's prediction.
    pub prediction: f64,
    /// Mean squared error against the teacher's attention outputs, averaged over the watched layers.
    pub attention: f64,
    /// The weighted sum, which is minimised.
    pub total: f64,
}

/// Losses of `batch` and the gradients of their total. `activations` changes memory and time but not the result, which is
/// equal bit for bit.
///
/// The samples of a small model run separately, in parallel: its operations are too short to be shared by threads.
///
/// # Errors
/// A watched layer that the model does not have, or a computation that a model or candle rejects.
pub fn backward(
    models: &TeacherStudent,
    batch: &Batch,
    settings: &LossSettings,
    activations: Activations,
) -> Result<(Losses, Gradients)> {
    let watched = settings.watched(models.student_with_gradients().layer_names())?;
    let parts = if models.is_small() { batch.split()? } else { vec![batch.clone()] };
    let of_part = |part: &Batch| backward_part(models, part, settings, activations, &watched);
    let found = parts.par_iter().map(of_part).collect::<Result<Vec<_>>>()?;
    mean(found)
}

fn backward_part(
    models: &TeacherStudent,
    batch: &Batch,
    settings: &LossSettings,
    activations: Activations,
    watched: &[usize],
) -> Result<(Losses, Gradients)> {
    // Nothing before the first block is trained, so teacher and student begin with the same state.
    let embedded = detached(models.training_teacher().embed(&batch.input)?);
    let targets = TeacherTargets::compute(models.training_teacher(), embedded.clone(), watched)?;
    let (mut saved, last) = forward(models.student_with_gradients(), embedded, activations)?;
    let mut pass = BackwardPass {
        models,
        settings,
        targets,
        watched: watched.len(),
        losses: Losses::default(),
        gradients: BTreeMap::new(),
    };
    let mut gradient = pass.head(last, &batch.target)?;
    while let Some(activation) = saved.pop() {
        gradient = pass.block(saved.len(), activation, &gradient)?;
    }
    Ok((pass.losses, pass.gradients))
}

/// The mean over parts of equal size, added in order, so that it does not depend on the number of threads.
fn mean(parts: Vec<(Losses, Gradients)>) -> Result<(Losses, Gradients)> {
    let share = 1.0 / parts.len() as f64;
    let mut losses = Losses::default();
    let mut sums = Gradients::new();
    for (found, gradients) in parts {
        losses.add(found, share);
        add_gradients(&mut sums, gradients, share)?;
    }
    Ok((losses, sums))
}

/// Adds `share` times `gradients` to `sums`.
pub(crate) fn add_gradients(sums: &mut Gradients, gradients: Gradients, share: f64) -> Result<()> {
    for (name, gradient) in gradients {
        let gradient = if share == 1.0 { gradient } else { (gradient * share)? };
        let sum = match sums.remove(&name) {
            Some(before) => (before + gradient)?,
            None => gradient,
        };
        sums.insert(name, sum);
    }
    Ok(())
}

impl Losses {
    /// Adds `share` times `other`.
    pub(crate) fn add(&mut self, other: Self, share: f64) {
        self.denoising += other.denoising * share;
        self.prediction += other.prediction * share;
        self.attention += other.attention * share;
        self.total += other.total * share;
    }
}

/// Mean squared difference between the predictions of two models on fixed inputs, summed in f64; 0 for no inputs.
///
/// # Errors
/// A model rejects an input.
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

/// What the student should reproduce on a batch: the teacher's prediction, and its attention outputs by layer index.
struct TeacherTargets {
    prediction: Tensor,
    attention: BTreeMap<usize, Attended>,
}

impl TeacherTargets {
    fn compute(teacher: &dyn Denoiser, mut state: HiddenState, watched: &[usize]) -> Result<Self> {
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
    /// The input; backward runs the block again.
    Input(HiddenState),
    /// Input and output, with the graph between them.
    Graph(BlockInput, HiddenState),
}

/// Runs the student's blocks: what is saved of each, and the output of the last one, detached from the graph.
fn forward(
    student: &dyn Denoiser,
    mut state: HiddenState,
    activations: Activations,
) -> Result<(Vec<SavedActivation>, HiddenState)> {
    let mut saved = Vec::with_capacity(student.block_count());
    for index in 0..student.block_count() {
        let output = match activations {
            Activations::Recompute => {
                saved.push(SavedActivation::Input(state.clone()));
                student.block(index, state)?
            }
            Activations::Keep => {
                let (variables, entry) = BlockInput::of_block(index, state)?;
                let output = student.block(index, entry)?;
                saved.push(SavedActivation::Graph(variables, output.clone()));
                output
            }
        };
        state = detached(output);
    }
    Ok((saved, state))
}

fn detached(state: HiddenState) -> HiddenState {
    let text = state.text.map(|text| text.detach());
    HiddenState { image: state.image.detach(), text, attention: None, context: state.context }
}

/// Gradients of the loss with respect to a block's output; `None` where the loss does not depend on it.
struct OutputGradient {
    image: Option<Tensor>,
    text: Option<Tensor>,
}

impl OutputGradient {
    /// A scalar whose gradient with respect to `output` is this one, since candle's `backward` starts from a scalar.
    fn seed(&self, output: &HiddenState) -> Result<Tensor> {
        let mut sum = Tensor::zeros((), DType::F32, output.image.device())?;
        for (value, gradient) in [(Some(&output.image), &self.image), (output.text.as_ref(), &self.text)] {
            if let (Some(value), Some(gradient)) = (value, gradient) {
                sum = (sum + value.apply_op1(Seed(gradient.clone()))?)?;
            }
        }
        Ok(sum)
    }
}

/// Stands for the inner product of a tensor with its gradient. Only the gradient is wanted, so the product is not
/// computed: the value is 0.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((storage.device().zeros_impl(&Shape::from(()), DType::F32)?, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// The input of a block as variables, so that candle computes their gradients.
#[derive(Default)]
struct BlockInput {
    image: Option<Var>,
    text: Option<Var>,
}

impl BlockInput {
    /// The input of block `index`. Nothing before block 0 is trained, so its input needs no gradient.
    fn of_block(index: usize, entry: HiddenState) -> Result<(Self, HiddenState)> {
        if index == 0 { Ok((Self::default(), entry)) } else { Self::variables(entry) }
    }

    fn variables(entry: HiddenState) -> Result<(Self, HiddenState)> {
        let image = Var::from_tensor(&entry.image)?;
        let text = entry.text.as_ref().map(Var::from_tensor).transpose()?;
        let as_tensor = |var: &Var| var.as_tensor().clone();
        let state = HiddenState { image: as_tensor(&image), text: text.as_ref().map(as_tensor), ..entry };
        Ok((Self { image: Some(image), text }, state))
    }

    fn gradients(&self, store: &GradStore) -> OutputGradient {
        // Detached, since a gradient from the store may hold on to the graph.
        let take = |var: &Option<Var>| store.get(var.as_ref()?).map(Tensor::detach);
        OutputGradient { image: take(&self.image), text: take(&self.text) }
    }
}

/// Backward from the head to the first block.
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
        let (variables, state) = BlockInput::variables(last)?;
        let prediction = self.models.student_with_gradients().head(&state)?.to_dtype(DType::F32)?;
        let denoising = mean_square(&without_variance(&prediction, target)?, target)?;
        let distance = mean_square(&prediction, &self.targets.prediction)?;
        self.losses.denoising = scalar(&denoising)?;
        self.losses.prediction = scalar(&distance)?;
        let loss = ((denoising * self.settings.denoising)? + (distance * self.settings.prediction)?)?;
        self.losses.total = scalar(&loss)?;
        Ok(variables.gradients(&loss.backward()?))
    }

    fn block(
        &mut self,
        index: usize,
        activation: SavedActivation,
        gradient: &OutputGradient,
    ) -> Result<OutputGradient> {
        let (variables, output) = match activation {
            SavedActivation::Graph(variables, output) => (variables, output),
            SavedActivation::Input(entry) => {
                let (variables, entry) = BlockInput::of_block(index, entry)?;
                (variables, self.models.student_with_gradients().block(index, entry)?)
            }
        };
        let mut loss = gradient.seed(&output)?;
        if let (Some(target), Some(attended)) = (self.targets.attention.remove(&index), &output.attention) {
            let term = (attention_distance(attended, &target)? / self.watched as f64)?;
            self.losses.attention += scalar(&term)?;
            let weighted = (term * self.settings.attention)?;
            self.losses.total += scalar(&weighted)?;
            loss = (loss + weighted)?;
        }
        let store = loss.backward()?;
        self.collect(&store);
        Ok(variables.gradients(&store))
    }

    fn collect(&mut self, store: &GradStore) {
        for (name, master) in self.models.masters() {
            if let Some(gradient) = store.get(master) {
                self.gradients.insert(name.clone(), gradient.detach());
            }
        }
    }
}

/// Mean squared error over text and image rows together.
fn attention_distance(attended: &Attended, target: &Attended) -> Result<Tensor> {
    let mut sum = square_sum(&attended.image, &target.image)?;
    let mut count = attended.image.elem_count();
    if let (Some(text), Some(target)) = (&attended.text, &target.text) {
        sum = (sum + square_sum(text, target)?)?;
        count += text.elem_count();
    }
    Ok((sum / count as f64)?)
}

fn square_sum(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    sum_of_rows(&(a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.sqr()?)
}

/// Row by row first: candle reduces to a single value in one thread block, so summing everything at once would leave most
/// of a GPU idle.
fn sum_of_rows(x: &Tensor) -> candle_core::Result<Tensor> {
    x.sum(D::Minus1)?.to_dtype(DType::F32)?.sum_all()
}

fn mean_square(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    (a - b)?.sqr()?.mean_all()
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(f64::from(tensor.to_scalar::<f32>()?))
}
