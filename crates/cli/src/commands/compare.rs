//! `clearform compare`: teacher and student side by side on the same seeds.

use crate::args::CompareArgs;
use crate::evaluation::{EvaluationRun, attention_errors};
use crate::output::{CommandOutcome, Output};
use crate::report::Page;
use crate::sources::{open_original, open_plainly};
use anyhow::Context as _;
use clearform_models::Prompt;
use clearform_runtime::compare::{contact_sheet, psnr, ssim};
use clearform_runtime::{RgbImage, png};
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// Pictures whose attention is compared layer by layer.
const LAYER_PICTURES: usize = 4;

pub fn run(args: &CompareArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let (components, device) = (args.drawing.components.as_deref(), args.drawing.device);
    let teacher = open_original(&args.teacher, &args.student, components, device)?;
    let student = open_plainly(&args.student, components, device)?;
    let evaluation = EvaluationRun::new(&args.drawing, &teacher)?;
    let bar = output.progress("drawing", 2 * evaluation.prompts.len());
    let mut advance = |count: usize| bar.inc(count as u64);
    let original = teacher.load_transformer(teacher.plan(), None)?;
    let linear = student.load_transformer(student.plan(), None)?;
    let wanted = evaluation.draw(&teacher, original.as_ref(), &mut advance)?;
    let got = evaluation.draw(&student, linear.as_ref(), &mut advance)?;
    bar.finish_and_clear();
    let input = evaluation.halfway(&teacher, &wanted, evaluation.prompts.len().min(LAYER_PICTURES))?;
    let layers = attention_errors(original.as_ref(), linear.as_ref(), &input)?;
    let pictures = (evaluation.decode(&teacher, &wanted)?, evaluation.decode(&student, &got)?);
    let report = ComparisonReport::new(&evaluation, &pictures.0, &pictures.1, layers)?;
    write(&args.output, &report, &[pictures.0, pictures.1])?;
    output.result(&report)?;
    Ok(CommandOutcome::Whole)
}

/// How alike the models are.
#[derive(Debug, Serialize)]
struct ComparisonReport {
    steps: usize,
    seed: u64,
    psnr: f64,
    ssim: f64,
    pictures: Vec<ImagePair>,
    attention_error: Vec<(String, f64)>,
}

#[derive(Debug, Serialize)]
struct ImagePair {
    prompt: String,
    psnr: f64,
    ssim: f64,
}

impl ComparisonReport {
    fn new(
        evaluation: &EvaluationRun,
        wanted: &[RgbImage],
        got: &[RgbImage],
        attention_error: Vec<(String, f64)>,
    ) -> anyhow::Result<Self> {
        let pair = |(prompt, (wanted, got)): (&Prompt, (&RgbImage, &RgbImage))| -> anyhow::Result<ImagePair> {
            Ok(ImagePair { prompt: prompt.to_string(), psnr: psnr(wanted, got)?, ssim: ssim(wanted, got)? })
        };
        let pictures =
            evaluation.prompts.iter().zip(wanted.iter().zip(got)).map(pair).collect::<anyhow::Result<Vec<_>>>()?;
        let mean = |value: fn(&ImagePair) -> f64| pictures.iter().map(value).sum::<f64>() / pictures.len() as f64;
        let (psnr, ssim) = (mean(|pair| pair.psnr), mean(|pair| pair.ssim));
        Ok(Self { steps: evaluation.steps, seed: evaluation.seed, psnr, ssim, pictures, attention_error })
    }
}

impl fmt::Display for ComparisonReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for pair in &self.pictures {
            writeln!(f, "{:6.2} dB  SSIM {:.3}  {}", pair.psnr, pair.ssim, pair.prompt)?;
        }
        write!(f, "{:6.2} dB  SSIM {:.3}  mean of {}", self.psnr, self.ssim, self.pictures.len())
    }
}

fn write(folder: &Path, report: &ComparisonReport, rows: &[Vec<RgbImage>]) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    let sheet = contact_sheet(&rows.iter().map(|row| row.iter().collect()).collect::<Vec<_>>());
    let sheet = png::encode(&sheet, None)?;
    let mut page = Page::new("Teacher and student, side by side");
    page.paragraph(&format!(
        "{} prompts at {} steps from the same noise. Mean PSNR {:.2} dB, mean SSIM {:.3}.",
        report.pictures.len(),
        report.steps,
        report.psnr,
        report.ssim
    ));
    page.picture(&sheet, "Above: the teacher. Below: the linear model.");
    let pair = |pair: &ImagePair| vec![pair.prompt.clone(), format!("{:.2}", pair.psnr), format!("{:.3}", pair.ssim)];
    page.heading("Pictures")
        .table(&["prompt", "PSNR, dB", "SSIM"], &report.pictures.iter().map(pair).collect::<Vec<_>>());
    let layer = |(layer, error): &(String, f64)| vec![layer.clone(), format!("{:.1}%", 100.0 * error)];
    page.heading("Attention, layer by layer");
    page.paragraph("Relative error of each layer's attention output on latents noised half way; errors of earlier layers included.");
    page.table(&["layer", "relative error"], &report.attention_error.iter().map(layer).collect::<Vec<_>>());
    clearform_weights::write_atomically(folder.join("sheet.png"), &sheet)?;
    clearform_weights::write_atomically(folder.join("report.json"), &serde_json::to_vec_pretty(report)?)?;
    Ok(clearform_weights::write_atomically(folder.join("report.html"), page.render().as_bytes())?)
}
