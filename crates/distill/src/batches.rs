//! [`Batches`]: the endless sequence of noised samples that a student is trained on, from one random generator.

use crate::samples::SampleIndex;
use crate::{DistillError, DistillSettings, Precision, Result, SampleSet, TeacherStudent, Timesteps};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Conditions, DenoiserInput, NoiseProcess, Noised, StepIndex};
use clearform_sampling::TorchGenerator;

/// Noised samples and what should be predicted of them.
#[derive(Debug, Clone)]
pub struct Batch {
    /// What teacher and student are asked.
    pub input: DenoiserInput,
    /// What a perfect model predicts, f32, shaped as the latents.
    pub target: Tensor,
}

/// Draws batches from a set.
#[derive(Debug)]
pub struct Batches<'a> {
    samples: &'a SampleSet,
    settings: &'a DistillSettings,
    process: NoiseProcess,
    device: Device,
    generator: TorchGenerator,
}

/// Share of training that is of no subject where samples are drawn with classifier-free guidance: both of its
/// evaluations must be learned (Ho and Salimans, arXiv 2207.12598, algorithm 1).
const UNCONDITIONAL: f32 = 0.1;

impl Batch {
    /// `x0` noised to the levels `t` as `process` has it.
    ///
    /// # Shapes
    /// x0 and noise (batch, ...) in f32, t (batch) in f32.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn noised(
        process: NoiseProcess,
        x0: &Tensor,
        noise: &Tensor,
        t: &Tensor,
        conditions: Conditions,
    ) -> Result<Self> {
        let Noised { latents, timestep, target } = process.noised(x0, noise, t)?;
        Ok(Self { input: DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions }, target })
    }

    fn in_precision(mut self, precision: Precision) -> Result<Self> {
        if precision == Precision::Bf16 {
            self.input.latents = self.input.latents.to_dtype(DType::BF16)?;
        }
        Ok(self)
    }
}

impl<'a> Batches<'a> {
    /// Batches of `samples` for `pair` as `settings` ask, from `generator` on.
    pub fn new(
        samples: &'a SampleSet,
        settings: &'a DistillSettings,
        models: &TeacherStudent,
        generator: TorchGenerator,
    ) -> Self {
        Self { samples, settings, process: models.process(), device: models.device(), generator }
    }

    /// The next batch: samples with replacement, a noise level each, noise.
    ///
    /// # Errors
    /// A sample that cannot be read.
    pub fn draw(&mut self) -> Result<Batch> {
        let count = u32::try_from(self.samples.settings().count).unwrap_or(u32::MAX);
        let members: Vec<usize> = (0..self.settings.batch).map(|_| self.generator.below(count) as usize).collect();
        let t = levels(&mut self.generator, self.settings.timesteps, members.len())?;
        let members = self.with_subjects(members)?;
        let drawn = self.samples.read_members(&members, &self.device)?;
        let noise = self.generator.randn(drawn.latents.shape())?.to_device(&self.device)?;
        let t = t.to_device(&self.device)?;
        Batch::noised(self.process, &drawn.latents, &noise, &t, drawn.conditions)?.in_precision(self.settings.precision)
    }

    /// Takes the subject from some members, where the set has what stands for none.
    fn with_subjects(&mut self, members: Vec<usize>) -> Result<Vec<SampleIndex>> {
        if self.samples.settings().classifier_free.is_none() {
            return Ok(members.into_iter().map(SampleIndex::of).collect());
        }
        let chance: Vec<f32> = self.generator.rand(members.len())?.to_vec1()?;
        let prompt = |(sample, chance)| SampleIndex { sample, unconditional: chance < UNCONDITIONAL };
        Ok(members.into_iter().zip(chance).map(prompt).collect())
    }

    /// The random state after the batches drawn so far.
    pub fn generator(&self) -> &TorchGenerator {
        &self.generator
    }
}

impl SampleSet {
    /// Every sample once, noised as `process` has it, by noise and uniform levels that depend on `seed` alone: what models are compared on.
    ///
    /// # Errors
    /// A sample that cannot be read, or no batch at all.
    pub fn noised(
        &self,
        process: NoiseProcess,
        seed: u64,
        batch: usize,
        device: &Device,
    ) -> Result<Vec<DenoiserInput>> {
        if batch == 0 {
            return Err(DistillError::BadSetting { key: "batch", reason: "expected at least 1, found 0".to_owned() });
        }
        let mut generator = TorchGenerator::new(seed);
        let all: Vec<usize> = (0..self.settings().count).collect();
        let mut inputs = Vec::new();
        for members in all.chunks(batch) {
            let drawn = self.read(members, device)?;
            let t = generator.rand(members.len())?.to_device(device)?;
            let noise = generator.randn(drawn.latents.shape())?.to_device(device)?;
            inputs.push(Batch::noised(process, &drawn.latents, &noise, &t, drawn.conditions)?.input);
        }
        Ok(inputs)
    }
}

fn levels(generator: &mut TorchGenerator, timesteps: Timesteps, count: usize) -> Result<Tensor> {
    match timesteps {
        Timesteps::Uniform => Ok(generator.rand(count)?),
        Timesteps::LogitNormal { mean, deviation } => {
            let normal = generator.randn(count)?.affine(deviation, mean)?;
            Ok((normal.neg()?.exp()? + 1.0)?.recip()?)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn logit_normal_levels_lie_in_between_and_around_the_mean() {
        let mut generator = TorchGenerator::new(1);
        let levels = levels(&mut generator, Timesteps::LogitNormal { mean: 1.0, deviation: 0.5 }, 4000).unwrap();
        let levels = levels.to_vec1::<f32>().unwrap();
        assert!(levels.iter().all(|&t| t > 0.0 && t < 1.0));
        let above = levels.iter().filter(|&&t| t > 0.731_058_6).count();
        assert!((1850..2150).contains(&above), "{above} of 4000 above the median");
    }
}
