//! [`Batches`]: the endless sequence of noised samples that a student is trained on, from one random generator.

use crate::{DistillError, Precision, Result, SampleSet, Settings, Timesteps};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Conditions, DenoiserInput, Moment};
use clearform_sampling::TorchGenerator;

/// Noised samples and what should be predicted of them.
#[derive(Debug, Clone)]
pub struct Batch {
    /// What teacher and student are asked.
    pub input: DenoiserInput,
    /// Noise minus sample, f32, shaped as the latents.
    pub target: Tensor,
}

/// Draws batches from a set.
#[derive(Debug)]
pub struct Batches<'a> {
    samples: &'a SampleSet,
    settings: &'a Settings,
    device: Device,
    generator: TorchGenerator,
}

impl Batch {
    /// x_t = (1 − t) x₀ + t noise: the straight path of a rectified flow (Liu et al., arXiv 2209.03003).
    ///
    /// # Shapes
    /// x0 and noise (batch, ...) in f32, t (batch) in f32.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn noised(x0: &Tensor, noise: &Tensor, t: &Tensor, conditions: Conditions) -> Result<Self> {
        let mut extents = vec![1; x0.rank()];
        extents[0] = t.dim(0)?;
        let level = t.reshape(extents)?;
        let latents = (x0.broadcast_mul(&level.affine(-1.0, 1.0)?)? + noise.broadcast_mul(&level)?)?;
        Ok(Self {
            input: DenoiserInput { latents, timestep: t.clone(), moment: Moment::default(), conditions },
            target: (noise - x0)?,
        })
    }

    fn in_precision(mut self, precision: Precision) -> Result<Self> {
        if precision == Precision::Bf16 {
            self.input.latents = self.input.latents.to_dtype(DType::BF16)?;
        }
        Ok(self)
    }
}

impl<'a> Batches<'a> {
    /// Batches of `samples` as `settings` ask, from `generator` on.
    pub fn new(samples: &'a SampleSet, settings: &'a Settings, device: &Device, generator: TorchGenerator) -> Self {
        Self { samples, settings, device: device.clone(), generator }
    }

    /// The next batch: samples with replacement, a noise level each, noise.
    ///
    /// # Errors
    /// A sample that cannot be read.
    pub fn draw(&mut self) -> Result<Batch> {
        let count = u32::try_from(self.samples.settings().count).unwrap_or(u32::MAX);
        let members: Vec<usize> = (0..self.settings.batch).map(|_| self.generator.below(count) as usize).collect();
        let t = levels(&mut self.generator, self.settings.timesteps, members.len())?;
        let drawn = self.samples.read(&members, &self.device)?;
        let noise = self.generator.randn(drawn.latents.shape())?.to_device(&self.device)?;
        let t = t.to_device(&self.device)?;
        Batch::noised(&drawn.latents, &noise, &t, drawn.conditions)?.in_precision(self.settings.precision)
    }

    /// The random state after the batches drawn so far.
    pub fn generator(&self) -> &TorchGenerator {
        &self.generator
    }
}

impl SampleSet {
    /// Every sample once, noised by noise and uniform levels that depend on `seed` alone: what models are compared on.
    ///
    /// # Errors
    /// A sample that cannot be read, or no batch at all.
    pub fn noised(&self, seed: u64, batch: usize, device: &Device) -> Result<Vec<DenoiserInput>> {
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
            inputs.push(Batch::noised(&drawn.latents, &noise, &t, drawn.conditions)?.input);
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
    fn samples_are_noised_along_a_straight_path() {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap().reshape((2, 1, 1)).unwrap();
        let t = Tensor::new(&[0.0f32, 0.25], &Device::Cpu).unwrap();
        let batch = Batch::noised(&tensor(&[2.0, 4.0]), &tensor(&[-1.0, 8.0]), &t, Conditions::default()).unwrap();
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&batch.input.latents), [2.0, 5.0]);
        assert_eq!(flat(&batch.target), [-3.0, 4.0]);
    }

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
