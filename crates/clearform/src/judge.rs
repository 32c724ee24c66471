//! [`Judge`]: measures how near a student is to its teacher before and after training, on samples it is not trained on.

use crate::Result;
use crate::error::WithContext as _;
use crate::evaluation::step_action;
use crate::observer::{Observer, Progress, Stage};
use crate::training_samples::HeldOutSamples;
use candle_core::{Device, Tensor};
use clearform_distill::{HELD_OUT_LEVELS, HeldOut, TeacherStudent};
use clearform_models::Denoiser;
use clearform_portable_model::{ImageVerdict, LevelErrors, VerdictRecord};
use clearform_runtime::RgbImage;
use clearform_runtime::image_metrics::{psnr_of_all, ssim};
use clearform_sampling::StepProgress;
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource as _, is_finite};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

/// Image tokens of all images that are generated for a verdict: 16 of 256 tokens, as mini-flux has, or 4 of 4096.
const FEW_TOKENS: usize = 256;
const MANY_IMAGES: usize = 16;
const FEW_IMAGES: usize = 4;

/// What the student is compared with, and how it did before training.
pub struct Judge<'a> {
    samples: &'a HeldOutSamples,
    held_out: HeldOut,
    teacher: Vec<RgbImage>,
    before: Vec<RgbImage>,
}

/// The figures, and the images that they were measured on.
pub struct Verdict {
    /// The figures.
    pub record: VerdictRecord,
    /// Rows of images from the same noise: the teacher's, the student's before training, and after.
    pub images: [Vec<RgbImage>; 3],
}

impl<'a> Judge<'a> {
    /// Judges the student of `models` as it is before training. What it generates is kept in `folder`, for a resumed run.
    ///
    /// # Errors
    /// A model fails, or an image cannot be decoded; [`ClearformError::Cancelled`](crate::ClearformError::Cancelled).
    pub fn new(
        models: &TeacherStudent,
        samples: &'a HeldOutSamples,
        folder: &Path,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        let held_out = HeldOut::new(models, &samples.set, &mut |done, total| compared(done, total, observer))?;
        let mut judge = Self { samples, held_out, teacher: Vec::new(), before: Vec::new() };
        let indices: Vec<usize> = (0..judge.image_count()?).collect();
        let wanted = samples.set.read(&indices, &Device::Cpu)?.latents;
        judge.teacher = judge.decode(&wanted)?;
        let path = folder.join("undistilled.safetensors");
        // What is missing, damaged or of another number of samples is generated again.
        let kept = Checkpoint::open(&path).and_then(|file| file.tensor("latents")).ok();
        let fits = |latents: &Tensor| latents.dims() == wanted.dims() && is_finite(latents).is_ok_and(|finite| finite);
        let before = match kept.filter(fits) {
            Some(latents) => latents,
            None => {
                let latents = judge.generate(models.student(), judge.teacher.len(), observer)?;
                let tensors = InMemoryTensors::from_iter([("latents".to_owned(), latents.clone())]);
                std::fs::create_dir_all(folder).context(folder.display())?;
                clearform_weights::save(&path, &tensors, &BTreeMap::new())?;
                latents
            }
        };
        judge.before = judge.decode(&before)?;
        Ok(judge)
    }

    /// The inputs on which training measures its progress.
    pub fn held_out(&self) -> &HeldOut {
        &self.held_out
    }

    /// The mean error of the student of `models` as it is now.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn error_of(&self, models: &TeacherStudent, observer: &mut dyn Observer) -> Result<f64> {
        Ok(self.held_out.errors(models, &mut |done, total| compared(done, total, observer))?.mean())
    }

    /// The teacher's images, and those of the student before training from the same noise.
    pub fn images_before(&self) -> [&[RgbImage]; 2] {
        [&self.teacher, &self.before]
    }

    /// What `denoiser` makes of the noise of the first `count` images, or of all if there are fewer.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn images_of(
        &self,
        denoiser: &dyn Denoiser,
        count: usize,
        observer: &mut dyn Observer,
    ) -> Result<Vec<RgbImage>> {
        self.decode(&self.generate(denoiser, count.min(self.teacher.len()), observer)?)
    }

    /// Judges the student of `models` as it is now.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn verdict(self, models: &TeacherStudent, observer: &mut dyn Observer) -> Result<Verdict> {
        let before = self.held_out.before();
        let after = self.held_out.errors(models, &mut |done, total| compared(done, total, observer))?;
        let level = |(index, noise): (usize, f64)| LevelErrors {
            noise,
            power: after.power[index],
            before: before.levels[index],
            after: after.levels[index],
        };
        let images = self.images_of(models.student(), self.teacher.len(), observer)?;
        let record = VerdictRecord {
            samples: self.samples.set.settings().count,
            power: after.mean_power(),
            error_before: before.mean(),
            error_after: after.mean(),
            level: HELD_OUT_LEVELS.into_iter().enumerate().map(level).collect(),
            images: Some(ImageVerdict {
                count: images.len(),
                psnr_before: psnr_of_all(&self.teacher, &self.before)?,
                psnr_after: psnr_of_all(&self.teacher, &images)?,
                ssim_before: mean_ssim(&self.teacher, &self.before),
                ssim_after: mean_ssim(&self.teacher, &images),
            }),
        };
        Ok(Verdict { record, images: [self.teacher, self.before, images] })
    }

    fn image_count(&self) -> Result<usize> {
        let tokens = self.samples.pipeline.initial_latents(0, 1, self.samples.size())?.image_tokens;
        let most = if tokens <= FEW_TOKENS { MANY_IMAGES } else { FEW_IMAGES };
        Ok(most.min(self.samples.set.settings().count))
    }

    /// What `denoiser` generates from the noise of the first `count` of the teacher's images.
    fn generate(&self, denoiser: &dyn Denoiser, count: usize, observer: &mut dyn Observer) -> Result<Tensor> {
        let HeldOutSamples { set, sampling_spec, .. } = self.samples;
        let indices: Vec<usize> = (0..count).collect();
        let mut generated = Vec::new();
        for part in indices.chunks(set.settings().batch) {
            let counted = Progress::new(Stage::Comparing, generated.len() * set.settings().batch, indices.len());
            let mut hook = |step: &StepProgress| {
                let denoised = (part.len() * step.done) as f64 / (step.steps * indices.len()) as f64;
                let fraction = counted.fraction + denoised;
                step_action(observer.progress(&Progress { fraction, ..counted }))
            };
            generated.push(set.denoise(part, denoiser, sampling_spec, &mut hook)?);
        }
        Ok(Tensor::cat(&generated, 0)?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        let latents = latents.to_device(&self.samples.sampling_spec.device)?;
        let mut images = Vec::new();
        for index in 0..latents.dim(0)? {
            images.extend(self.samples.pipeline.decode(&latents.narrow(0, index, 1)?, self.samples.size())?);
        }
        Ok(images)
    }
}

/// Tells the observer how many evaluations are compared.
fn compared(done: usize, total: usize, observer: &mut dyn Observer) -> ControlFlow<()> {
    observer.progress(&Progress::new(Stage::Comparing, done, total))
}

/// A student falls short if more than this share of the error is left (with 7% digits are read as their teacher's are,
/// with 11% fewer letters are: docs/distillation.md), and ...
const SHORT_LEFT: f64 = 0.1;
/// ... the error is more than this share of the teacher's power: less cannot be seen in images.
const SHORT_POWER: f64 = 0.002;

/// A warning with advice, if the student falls short of its teacher.
pub fn warning(record: &VerdictRecord, steps: usize) -> Option<String> {
    let (left, of_power) = (record.left(), record.of_power());
    if left > 1.0 {
        return Some(format!("warning: training made the student worse: {left:.2} times the error; lower --lr"));
    }
    let falls_short = left > SHORT_LEFT && of_power > SHORT_POWER;
    falls_short.then(|| {
        format!(
            "warning: the student falls short of its teacher: {:.0}% of the error is left, {:.1}% of the teacher's power. \
             Train longer (--steps {} or --time), choose a larger radius, or add pooled context (--pool 4); distill \
             continues from this model",
            100.0 * left,
            100.0 * of_power,
            (2 * steps).max(1000)
        )
    })
}

/// A warning of a training after which the error of a student is larger than before, if it was one of an earlier training.
pub fn harm(before: Option<f64>, after: f64) -> Option<String> {
    before.filter(|before| after > *before).map(|before| {
        format!(
            "warning: this training made the student worse: its error was {before:.4}, and is {after:.4}; lower --lr, or \
             train longer"
        )
    })
}

/// `None` for images smaller than the window of SSIM.
fn mean_ssim(wanted: &[RgbImage], got: &[RgbImage]) -> Option<f64> {
    let values = wanted.iter().zip(got).map(|(wanted, got)| ssim(wanted, got).ok()).collect::<Option<Vec<_>>>()?;
    Some(values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_student_falls_short_by_share_and_by_power() {
        let record = |error_before, error_after| VerdictRecord {
            samples: 16,
            power: 2.0,
            error_before,
            error_after,
            level: Vec::new(),
            images: None,
        };
        assert!(warning(&record(0.2, 0.02), 100).is_none(), "a tenth is left");
        assert!(warning(&record(0.004, 0.003), 100).is_none(), "0.15% of the power");
        let short = warning(&record(0.2, 0.1), 700).unwrap_or_default();
        assert!(
            short.contains("50% of the error is left, 5.0% of the teacher's power") && short.contains("--steps 1400")
        );
        assert!(warning(&record(0.2, 0.3), 100).unwrap_or_default().contains("1.50 times the error; lower --lr"));
    }
}
