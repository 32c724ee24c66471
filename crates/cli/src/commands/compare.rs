//! `clearform compare`: generates images with teacher and student from the same seeds, and compares them.

use crate::args::CompareArgs;
use crate::evaluation::{EvaluationRun, attention_errors};
use crate::output::{CommandOutcome, Output};
use crate::report::Page;
use crate::sources::{open_original_pipeline, open_pipeline};
use anyhow::Context as _;
use clearform_models::Prompt;
use clearform_runtime::compare::{contact_sheet, psnr, ssim};
use clearform_runtime::{RgbImage, png};
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// Images on which attention is compared layer by layer: the error averages over all their tokens, so a few suffice.
const LAYER_IMAGES: usize = 4;

/// Writes the report, and prints its figures.
pub fn run(args: &CompareArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let components = args.sampling.components.as_deref();
    let device = args.running.device;
    let teacher = open_original_pipeline(&args.teacher, &args.student, components, device)?;
    let student = open_pipeline(&args.student, components, device)?;
    let evaluation = EvaluationRun::new(&args.sampling, &teacher)?;
    let bar = output.progress("generating", 2 * evaluation.prompts.len());
    let mut advance = |count: usize| bar.inc(count as u64);
    let original = teacher.load_transformer(teacher.plan(), None)?;
    let linear = student.load_transformer(student.plan(), None)?;
    let wanted = evaluation.generate_latents(&teacher, original.as_ref(), &mut advance)?;
    let got = evaluation.generate_latents(&student, linear.as_ref(), &mut advance)?;
    bar.finish_and_clear();
    let input = evaluation.halfway_input(&teacher, &wanted, evaluation.prompts.len().min(LAYER_IMAGES))?;
    let attention_error = attention_errors(original.as_ref(), linear.as_ref(), &input)?;
    let images = [evaluation.decode(&teacher, &wanted)?, evaluation.decode(&student, &got)?];
    let report = ComparisonReport::new(&evaluation, &images, attention_error)?;
    report.write(&args.output, &images)?;
    output.result(&report)?;
    Ok(CommandOutcome::Complete)
}

/// How similar the two models are.
#[derive(Debug, Serialize)]
struct ComparisonReport {
    steps: usize,
    seed: u64,
    psnr: f64,
    ssim: f64,
    #[serde(rename = "pictures")]
    images: Vec<ImagePair>,
    attention_error: Vec<(String, f64)>,
}

#[derive(Debug, Serialize)]
struct ImagePair {
    prompt: String,
    psnr: f64,
    ssim: f64,
}

impl ImagePair {
    fn new(prompt: &Prompt, wanted: &RgbImage, got: &RgbImage) -> anyhow::Result<Self> {
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
    ) -> anyhow::Result<Self> {
        let pairs = evaluation.prompts.iter().zip(wanted.iter().zip(got));
        let pairs = pairs.map(|(prompt, (wanted, got))| ImagePair::new(prompt, wanted, got));
        let images = pairs.collect::<anyhow::Result<Vec<_>>>()?;
        let mean = |value: fn(&ImagePair) -> f64| images.iter().map(value).sum::<f64>() / images.len() as f64;
        let psnr = mean(|pair| pair.psnr);
        let ssim = mean(|pair| pair.ssim);
        Ok(Self { steps: evaluation.steps, seed: evaluation.seed, psnr, ssim, images, attention_error })
    }

    /// Writes `report.html`, `report.json` and the contact sheet `sheet.png`.
    fn write(&self, folder: &Path, images: &[Vec<RgbImage>; 2]) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
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
