//! [`Batches`]: the endless sequence of noised samples that a student is trained on, drawn with one random generator.

use crate::sample_files::SampleIndex;
use crate::sample_reader::SampleReader;
use crate::settings::at_least_one;
use crate::{DistillSettings, Precision, Result, SampleSet, Samples, TeacherStudent, Timesteps};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Conditions, DenoiserInput, NoiseProcess, Noised, StepIndex};
use clearform_sampling::TorchGenerator;

/// Noised samples and the target of their prediction.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The input of teacher and student.
    pub input: DenoiserInput,
    /// What a perfect model predicts, f32, in the shape of the latents.
    pub target: Tensor,
}

/// Makes batches of the samples of a [`SampleSet`].
#[derive(Debug)]
pub struct Batches<'a> {
    samples: &'a SampleSet,
    reader: SampleReader<'a>,
    settings: &'a DistillSettings,
    process: NoiseProcess,
    device: Device,
    generator: TorchGenerator,
}

/// Fraction of training samples whose prompt is replaced by the unconditional one where the model is used with
/// classifier-free guidance, since both of its evaluations must be learned. Ho and Salimans (arXiv 2207.12598,
/// algorithm 1) try 0.1, 0.2 and 0.5 and find 0.1 and 0.2 equally good.
const UNCONDITIONAL: f32 = 0.1;

impl Batch {
    /// `x0` noised by `process` to the noise levels `t`, from 0 (data) to 1 (noise).
    ///
    /// # Shapes
    /// x0 and noise (batch, ...) in f32, t (batch) in f32.
    ///
    /// # Errors
    /// Shapes differ.
    pub fn noised(
        process: NoiseProcess,
        x0: &Tensor,
        noise: &Tensor,
        t: &Tensor,
        conditions: Conditions,
    ) -> Result<Self> {
        let Noised { latents, timestep, target } = process.add_noise(x0, noise, t)?;
        Ok(Self { input: DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions }, target })
    }

    /// Each sample as a batch of its own.
    pub(crate) fn split(&self) -> Result<Vec<Self>> {
        let sample = |index| {
            let input = self.input.samples(index, 1)?;
            Ok(Self { input, target: self.target.narrow(0, index, 1)? })
        };
        (0..self.input.batch()?).map(sample).collect()
    }

    /// The batch with latents in the dtype of the activations: f32 on a CPU, whose products alone are rounded to bf16.
    pub(crate) fn in_precision(mut self, precision: Precision) -> Result<Self> {
        if precision == Precision::Bf16 && !self.input.latents.device().is_cpu() {
            self.input.latents = self.input.latents.to_dtype(DType::BF16)?;
        }
        Ok(self)
    }
}

impl<'a> Batches<'a> {
    /// Batches of `samples` for `models` as `settings` say, starting from the state of `generator`.
    ///
    /// # Errors
    /// A file of the set is missing or damaged.
    pub fn new(
        samples: &'a SampleSet,
        settings: &'a DistillSettings,
        models: &TeacherStudent,
        generator: TorchGenerator,
    ) -> Result<Self> {
        let reader = SampleReader::holding(samples.files())?;
        Ok(Self { samples, reader, settings, process: models.process(), device: models.device(), generator })
    }

    /// The next batch: samples drawn with replacement, each with a noise level and noise of its own. The order of the
    /// draws is fixed, since a resumed training must continue with the same random values.
    ///
    /// # Errors
    /// A sample cannot be read.
    pub fn draw(&mut self) -> Result<Batch> {
        let count = u32::try_from(self.samples.settings().count).unwrap_or(u32::MAX);
        let samples: Vec<usize> = (0..self.settings.batch).map(|_| self.generator.below(count) as usize).collect();
        let t = noise_levels(&mut self.generator, self.settings.timesteps, samples.len())?;
        let indices = self.drop_prompts(samples)?;
        let Samples { latents, conditions } = self.reader.read(&indices, &self.device)?;
        let noise = self.generator.randn(latents.shape())?.to_device(&self.device)?;
        let t = t.to_device(&self.device)?;
        Batch::noised(self.process, &latents, &noise, &t, conditions)?.in_precision(self.settings.precision)
    }

    /// Makes some samples unconditional where the set was generated with classifier-free guidance.
    fn drop_prompts(&mut self, samples: Vec<usize>) -> Result<Vec<SampleIndex>> {
        if self.samples.settings().classifier_free.is_none() {
            return Ok(samples.into_iter().map(SampleIndex::conditional).collect());
        }
        let chances: Vec<f32> = self.generator.rand(samples.len())?.to_vec1()?;
        let index = |(sample, chance)| SampleIndex { sample, unconditional: chance < UNCONDITIONAL };
        Ok(samples.into_iter().zip(chances).map(index).collect())
    }

    /// The state of the generator after the batches drawn so far.
    pub fn generator(&self) -> &TorchGenerator {
        &self.generator
    }
}

impl SampleSet {
    /// Every sample once, in batches of `batch`, noised by `process`. Noise and (uniform) noise levels depend on `seed`
    /// alone, so that models can be compared on the same inputs.
    ///
    /// # Errors
    /// A sample cannot be read, or `batch` is 0.
    pub fn noised(
        &self,
        process: NoiseProcess,
        seed: u64,
        batch: usize,
        device: &Device,
    ) -> Result<Vec<DenoiserInput>> {
        at_least_one("batch", batch)?;
        let mut generator = TorchGenerator::new(seed);
        let all: Vec<usize> = (0..self.settings().count).collect();
        let mut inputs = Vec::new();
        for samples in all.chunks(batch) {
            let Samples { latents, conditions } = self.read(samples, device)?;
            let t = generator.rand(samples.len())?.to_device(device)?;
            let noise = generator.randn(latents.shape())?.to_device(device)?;
            inputs.push(Batch::noised(process, &latents, &noise, &t, conditions)?.input);
        }
        Ok(inputs)
    }
}

fn noise_levels(generator: &mut TorchGenerator, timesteps: Timesteps, count: usize) -> Result<Tensor> {
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
    fn logit_normal_levels_have_the_quantiles_of_their_distribution() {
        let timesteps = Timesteps::LogitNormal { mean: 1.0, deviation: 0.5 };
        let levels = noise_levels(&mut TorchGenerator::new(1), timesteps, 4000).unwrap();
        let levels = levels.to_vec1::<f32>().unwrap();
        assert!(levels.iter().all(|&t| t > 0.0 && t < 1.0));
        // The logistic function of mean - deviation, mean, and mean + deviation: 84.13%, 50% and 15.87% are above. The
        // standard deviation of these counts is at most 32.
        for (bound, expected) in [(0.622_459_3, 3365), (0.731_058_6, 2000), (0.817_574_5, 635)] {
            let above = levels.iter().filter(|&&t| t > bound).count();
            assert!(above.abs_diff(expected) < 100, "{above} of 4000 above {bound}, expected about {expected}");
        }
    }
}
