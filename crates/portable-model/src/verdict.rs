//! [`VerdictRecord`]: how near a distilled model is to its teacher, on samples that it was not trained on.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How near a distilled model is to its teacher, on samples that it was not trained on. "Before" is the student as
/// training found it: the teacher with its attention replaced, or an earlier student.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerdictRecord {
    /// Number of samples.
    pub samples: usize,
    /// Mean square of the teacher's predictions.
    pub power: f64,
    /// Mean squared error of the student's predictions against the teacher's, before.
    pub error_before: f64,
    /// The same after training.
    pub error_after: f64,
    /// The errors of each noise level.
    pub level: Vec<LevelErrors>,
    /// How near images are, if any were generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<ImageVerdict>,
}

/// Errors at one noise level, as [`VerdictRecord`] has them over all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LevelErrors {
    /// The noise level: 0 is an image, 1 is noise.
    pub noise: f64,
    /// Mean square of the teacher's predictions.
    pub power: f64,
    /// Mean squared error before.
    pub before: f64,
    /// The same after training.
    pub after: f64,
}

/// How near the student's images are to those that the teacher generates from the same noise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageVerdict {
    /// Number of images.
    pub count: usize,
    /// PSNR over all images together before training, in dB.
    pub psnr_before: f64,
    /// The same after.
    pub psnr_after: f64,
    /// Mean SSIM before; none for images smaller than its window of 11 pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssim_before: Option<f64>,
    /// The same after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssim_after: Option<f64>,
}

impl VerdictRecord {
    /// What is left of the error before training: a share, 1 if nothing was gained, 0 if there is none.
    pub fn left(&self) -> f64 {
        if self.error_after == 0.0 { 0.0 } else { self.error_after / self.error_before }
    }

    /// The error after training as a share of the teacher's power.
    pub fn of_power(&self) -> f64 {
        if self.error_after == 0.0 { 0.0 } else { self.error_after / self.power }
    }
}

impl fmt::Display for VerdictRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, error_before, error_after, .. } = self;
        write!(
            f,
            "error on {samples} samples that were held out: {error_before:.4} before, {error_after:.4} after: {} left, {} of \
             the teacher's power",
            percent(self.left()),
            percent(self.of_power())
        )?;
        let Some(images) = &self.images else { return Ok(()) };
        let ImageVerdict { count, psnr_before, psnr_after, .. } = images;
        write!(f, "\n{count} images beside the teacher's: PSNR {psnr_before:.1} dB before, {psnr_after:.1} dB after")?;
        match (images.ssim_before, images.ssim_after) {
            (Some(before), Some(after)) => write!(f, "; SSIM {before:.3} before, {after:.3} after"),
            _ => Ok(()),
        }
    }
}

/// A share in percent, with two digits.
fn percent(share: f64) -> String {
    let digits = if share < 0.0995 { 1 } else { 0 };
    format!("{:.digits$}%", 100.0 * share)
}
