//! [`compare`]: generates images with teacher and student from the same seeds, and compares them.

use crate::error::WithContext as _;
use crate::evaluation::{EvaluationOptions, EvaluationRun, attention_errors};
use crate::observer::{Observer, Progress, Stage};
use crate::page::Page;
use crate::sources::{open_original_pipeline, open_pipeline};
use crate::{ComputeDevice, Result};
use clearform_models::Prompt;
use clearform_runtime::image_metrics::{contact_sheet, psnr, ssim};
use clearform_runtime::{RgbImage, png};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// Images on which attention is compared layer by layer: the error averages over all their tokens, so a few suffice.
const LAYER_IMAGES: usize = 4;

/// What [`compare`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompareOptions {
    /// The original model.
    pub teacher: PathBuf,
    /// The linear model.
    pub student: PathBuf,
    /// Folder of the report: `report.html`, `report.json` and `sheet.png`.
    pub output: PathBuf,
    /// What both generate.
    #[serde(default)]
    pub evaluation: EvaluationOptions,
    /// Where both run.
    #[serde(default)]
    pub device: ComputeDevice,
}

impl CompareOptions {
    /// Compares `student` with `teacher` on a few built-in prompts, and writes the report to `output`.
    pub fn new(teacher: impl Into<PathBuf>, student: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            teacher: teacher.into(),
            student: student.into(),
            output: output.into(),
            evaluation: EvaluationOptions::default(),
            device: ComputeDevice::default(),
        }
    }
}

/// Generates the same images with both models, and writes a report on how similar they are.
///
/// # Errors
/// A model cannot be opened or run, or the report cannot be written;
/// [`ClearformError::Cancelled`](crate::ClearformError::Cancelled).
///
/// # Example
/// ```no_run
/// use clearform::{CompareOptions, compare};
///
/// let report = compare(&CompareOptions::new("FLUX.1-dev", "FLUX.1-dev-clear", "comparison"), &mut ())?;
/// println!("PSNR {:.1} dB, SSIM {:.3}", report.psnr, report.ssim);
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn compare(options: &CompareOptions, observer: &mut dyn Observer) -> Result<ComparisonReport> {
    let components = options.evaluation.extra_components();
    let teacher = open_original_pipeline(&options.teacher, &options.student, components, options.device)?;
    let student = open_pipeline(&options.student, components, options.device)?;
    let evaluation = EvaluationRun::new(&options.evaluation, &teacher)?;
    let mut done = 0;
    let total = 2 * evaluation.prompts.len();
    let mut advance = |count: usize| {
        done += count;
        observer.progress(&Progress::new(Stage::Comparing, done, total))
    };
    let original = teacher.load_transformer(teacher.plan(), None)?;
    let linear = student.load_transformer(student.plan(), None)?;
    let wanted = evaluation.generate_latents(&teacher, original.as_ref(), &mut advance)?;
    let got = evaluation.generate_latents(&student, linear.as_ref(), &mut advance)?;
    let input = evaluation.halfway_input(&teacher, &wanted, evaluation.prompts.len().min(LAYER_IMAGES))?;
    let attention_error = attention_errors(original.as_ref(), linear.as_ref(), &input)?;
    let images = [evaluation.decode(&teacher, &wanted)?, evaluation.decode(&student, &got)?];
    let report = ComparisonReport::new(&evaluation, &images, attention_error)?;
    report.write(&options.output, &images)?;
    Ok(report)
}

/// How similar the two models are.
#[derive(Debug, Clone, Serialize)]
pub struct ComparisonReport {
    /// Denoising steps.
    pub steps: usize,
    /// Seed of the first image.
    pub seed: u64,
    /// Mean PSNR, in dB.
    pub psnr: f64,
    /// Mean SSIM.
    pub ssim: f64,
    /// Each prompt.
    #[serde(rename = "pictures")]
    pub images: Vec<ImagePair>,
    /// Relative error of each layer's attention output, by layer name.
    pub attention_error: Vec<(String, f64)>,
}

/// How similar the images of one prompt are.
#[derive(Debug, Clone, Serialize)]
pub struct ImagePair {
    /// The prompt.
    pub prompt: String,
    /// PSNR, in dB.
    pub psnr: f64,
    /// SSIM.
    pub ssim: f64,
}

impl ImagePair {
    fn new(prompt: &Prompt, wanted: &RgbImage, got: &RgbImage) -> Result<Self> {
        Ok(Self { prompt: prompt.to_string(), psnr: psnr(wanted, got)?, ssim: ssim(wanted, got)? })
    }

    fn row(&self) -> Vec<String> {
        vec![self.prompt.clone(), format!("{:.2}", self.psnr), format!("{:.3}", self.ssim)]
    }
}

impl ComparisonReport {
    /// Compares the teacher's images with the student's.
    fn new(
        evaluation: &EvaluationRun,
        [wanted, got]: &[Vec<RgbImage>; 2],
        attention_error: Vec<(String, f64)>,
    ) -> Result<Self> {
        let pairs = evaluation.prompts.iter().zip(wanted.iter().zip(got));
        let pairs = pairs.map(|(prompt, (wanted, got))| ImagePair::new(prompt, wanted, got));
        let images = pairs.collect::<Result<Vec<_>>>()?;
        let mean = |value: fn(&ImagePair) -> f64| images.iter().map(value).sum::<f64>() / images.len() as f64;
        let psnr = mean(|pair| pair.psnr);
        let ssim = mean(|pair| pair.ssim);
        Ok(Self { steps: evaluation.steps, seed: evaluation.seed, psnr, ssim, images, attention_error })
    }

    /// Writes `report.html`, `report.json` and the contact sheet `sheet.png`.
    fn write(&self, folder: &Path, images: &[Vec<RgbImage>; 2]) -> Result<()> {
        std::fs::create_dir_all(folder).context(folder.display())?;
        let sheet = contact_sheet(&images.each_ref().map(|row| row.iter().collect::<Vec<_>>()));
        let sheet = png::encode(&sheet, None)?;
        let page = self.page(&sheet);
        clearform_weights::write_atomically(folder.join("sheet.png"), &sheet)?;
        clearform_weights::write_atomically(folder.join("report.json"), &serde_json::to_vec_pretty(self)?)?;
        Ok(clearform_weights::write_atomically(folder.join("report.html"), page.render().as_bytes())?)
    }

    fn page(&self, sheet: &[u8]) -> Page {
        let mut page = Page::new("Teacher and student, side by side");
        page.paragraph(&format!(
            "{} prompts, {} steps, the same initial noise. Mean PSNR {:.2} dB, mean SSIM {:.3}.",
            self.images.len(),
            self.steps,
            self.psnr,
            self.ssim
        ));
        page.image(sheet, "Top: the teacher. Bottom: the linear model.");
        let rows: Vec<_> = self.images.iter().map(ImagePair::row).collect();
        page.heading("Images").table(&["prompt", "PSNR, dB", "SSIM"], &rows);
        page.heading("Attention error per layer").paragraph(
            "Relative error of each layer's attention output at noise level 0.5, including errors from earlier layers.",
        );
        let row = |(layer, error): &(String, f64)| vec![layer.clone(), format!("{:.1}%", 100.0 * error)];
        let rows: Vec<_> = self.attention_error.iter().map(row).collect();
        page.table(&["layer", "relative error"], &rows);
        page
    }
}

impl fmt::Display for ComparisonReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for pair in &self.images {
            writeln!(f, "{:6.2} dB  SSIM {:.3}  {}", pair.psnr, pair.ssim, pair.prompt)?;
        }
        write!(f, "{:6.2} dB  SSIM {:.3}  mean of {}", self.psnr, self.ssim, self.images.len())
    }
}
