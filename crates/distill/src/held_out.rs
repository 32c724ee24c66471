//! [`HeldOut`]: samples that training does not see, on which a student is judged.

use crate::parallel::{map_each, map_watched};
use crate::{Batch, Precision, Result, SampleSet, Samples, TeacherStudent};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Denoiser, DenoiserInput, without_variance};
use clearform_sampling::TorchGenerator;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

/// Noise levels at which predictions are compared: the centres of five equal intervals of [0, 1].
pub const HELD_OUT_LEVELS: [f64; 5] = [0.1, 0.3, 0.5, 0.7, 0.9];

/// Seed of the noise. Together with the set it determines every input.
const SEED: u64 = 1234;

/// Each sample of a set at each of [`HELD_OUT_LEVELS`], and what the teacher predicts there.
pub struct HeldOut {
    entries: Vec<HeldOutEntry>,
    before: PredictionErrors,
    quick_before: f64,
}

struct HeldOutEntry {
    /// Index into [`HELD_OUT_LEVELS`].
    level: usize,
    /// Whether it belongs to the few inputs that are evaluated during training.
    is_quick: bool,
    input: DenoiserInput,
    /// The teacher's prediction, f32.
    target: Tensor,
}

/// How far a student's predictions are from its teacher's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PredictionErrors {
    /// Mean squared error at each of [`HELD_OUT_LEVELS`].
    pub levels: Vec<f64>,
    /// Mean square of the teacher's predictions at each level: the error of a student that predicts nothing.
    pub power: Vec<f64>,
}

impl PredictionErrors {
    /// Mean squared error over all levels.
    pub fn mean(&self) -> f64 {
        mean(&self.levels)
    }

    /// Mean square of the teacher's predictions over all levels.
    pub fn mean_power(&self) -> f64 {
        mean(&self.power)
    }
}

impl HeldOut {
    /// Takes the samples of `set`, and compares the student of `models` as it is now with the teacher. `watch` is called
    /// with the evaluations that are done and all of them, and may cancel.
    ///
    /// # Errors
    /// A sample cannot be read, or a model rejects an input; [`Cancelled`](clearform_sampling::SamplingError::Cancelled).
    pub fn new(
        models: &TeacherStudent,
        set: &SampleSet,
        watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Self> {
        let count = set.settings().count;
        let all: Vec<usize> = (0..count).collect();
        let Samples { latents, conditions } = set.read(&all, &models.device())?;
        // A GPU's attention kernels take 16-bit values.
        let precision = if latents.device().is_cpu() { Precision::F32 } else { Precision::Bf16 };
        let mut generator = TorchGenerator::new(SEED);
        let mut inputs = Vec::new();
        for (level, value) in HELD_OUT_LEVELS.into_iter().enumerate() {
            let noise = generator.randn(latents.shape())?.to_device(latents.device())?;
            let t = Tensor::full(value as f32, count, latents.device())?;
            let batch = Batch::noised(models.process(), &latents, &noise, &t, conditions.clone())?;
            let batch = batch.in_precision(precision)?;
            let samples = batch.split()?.into_iter().enumerate();
            inputs.extend(samples.map(|(sample, batch)| (level, sample, batch.input)));
        }
        let entry = |(level, sample, input): (usize, usize, DenoiserInput)| {
            let target = prediction(models.teacher(), &input)?;
            let is_quick = sample % HELD_OUT_LEVELS.len() == level;
            Ok(HeldOutEntry { level, is_quick, input, target })
        };
        let count = inputs.len();
        let entries = map_watched(inputs, models.is_small(), &mut |done| watch(done, 2 * count), entry)?;
        let mut held_out = Self { entries, before: PredictionErrors::default(), quick_before: 0.0 };
        held_out.before = held_out.errors(models, &mut |done, _| watch(count + done, 2 * count))?;
        held_out.quick_before = held_out.quick_error(models)?;
        Ok(held_out)
    }

    /// The errors of the student when this was made: undistilled.
    pub fn before(&self) -> &PredictionErrors {
        &self.before
    }

    /// The errors of the student of `models` as it is now. `watch` is as in [`Self::new`].
    ///
    /// # Errors
    /// The student rejects an input; [`Cancelled`](clearform_sampling::SamplingError::Cancelled).
    pub fn errors(
        &self,
        models: &TeacherStudent,
        watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<PredictionErrors> {
        let error = |entry: &HeldOutEntry| {
            Ok((entry.level, entry.squared_error(models.student())?, mean_square(&entry.target)?))
        };
        let entries: Vec<&HeldOutEntry> = self.entries.iter().collect();
        let total = entries.len();
        let found = map_watched(entries, models.is_small(), &mut |done| watch(done, total), error)?;
        let mut sums = PredictionErrors::default();
        let samples = (found.len() / HELD_OUT_LEVELS.len()).max(1) as f64;
        for (level, error, power) in found {
            sums.levels[level] += error / samples;
            sums.power[level] += power / samples;
        }
        Ok(sums)
    }

    /// What is left of the error before training, on a fifth of the inputs, each sample at one level: a share, 1 before
    /// training.
    ///
    /// # Errors
    /// The student rejects an input.
    pub fn quick_share(&self, models: &TeacherStudent) -> Result<f64> {
        Ok(self.quick_error(models)? / self.quick_before)
    }

    fn quick_error(&self, models: &TeacherStudent) -> Result<f64> {
        let entries = self.entries.iter().filter(|entry| entry.is_quick).collect();
        Ok(mean(&map_each(entries, models.is_small(), |entry: &HeldOutEntry| entry.squared_error(models.student()))?))
    }
}

impl HeldOutEntry {
    fn squared_error(&self, student: &dyn Denoiser) -> Result<f64> {
        mean_square(&(prediction(student, &self.input)? - &self.target)?)
    }
}

impl Default for PredictionErrors {
    fn default() -> Self {
        let zeros = vec![0.0; HELD_OUT_LEVELS.len()];
        Self { levels: zeros.clone(), power: zeros }
    }
}

/// What `denoiser` predicts for the latents, in f32 on the CPU.
fn prediction(denoiser: &dyn Denoiser, input: &DenoiserInput) -> Result<Tensor> {
    let predicted = without_variance(&denoiser.forward(input)?, &input.latents)?;
    Ok(predicted.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}

fn mean_square(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_dtype(DType::F64)?.sqr()?.mean_all()?.to_scalar::<f64>()?)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
