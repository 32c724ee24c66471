//! The demo's results: figures, loss curves and images, as a table, as JSON and as an HTML page.

use anyhow::Context as _;
use clearform::TransferReport;
use clearform::chart::{Series, chart};
use clearform::page::Page;
use clearform_runtime::image_metrics::contact_sheet;
use clearform_runtime::{RgbImage, png};
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// The results of the demo.
#[derive(Debug, Serialize)]
pub struct DemoReport {
    /// Version of clearform.
    pub version: &'static str,
    /// Number of worker threads.
    pub threads: usize,
    /// Seconds spent generating the samples, which all students share.
    pub sample_seconds: f64,
    /// Number of samples.
    pub samples: usize,
    /// Share of the teacher's images whose nearest training image is that of their prompt.
    pub teacher_retrieval: f64,
    /// One entry per student.
    pub students: Vec<StudentResult>,
    /// What carries over to the last student; none without plugins.
    pub transfer: Option<TransferReport>,
    /// Total seconds.
    pub seconds: f64,
    /// The held-out prompts.
    #[serde(skip)]
    pub prompts: Vec<String>,
    /// The teacher's images.
    #[serde(skip)]
    pub teacher: Vec<RgbImage>,
}

/// One linear model, before and after distillation.
#[derive(Debug, Serialize)]
pub struct StudentResult {
    /// The attention plan.
    pub attention: String,
    /// Radius, in tokens.
    pub radius: f64,
    /// Edge of the cells that the image is averaged over, in tokens.
    pub pool: Option<usize>,
    /// Optimizer steps.
    pub steps: usize,
    /// Seconds spent on conversion and distillation.
    pub seconds: f64,
    /// Mean squared error of the prediction against the teacher's, before distillation.
    pub error_before: f64,
    /// The same after distillation.
    pub error_after: f64,
    /// PSNR of the images against the teacher's in dB, before distillation.
    pub psnr_before: f64,
    /// The same after distillation.
    pub psnr_after: f64,
    /// Share of images whose nearest training image is that of their prompt, before distillation.
    pub retrieval_before: f64,
    /// The same after distillation.
    pub retrieval_after: f64,
    /// Loss of each step.
    pub losses: Vec<f64>,
    /// Images before distillation.
    #[serde(skip)]
    pub undistilled: Vec<RgbImage>,
    /// Images after distillation.
    #[serde(skip)]
    pub distilled: Vec<RgbImage>,
}

const HEADINGS: [&str; 8] =
    ["attention", "steps", "seconds", "error before", "after", "PSNR before", "after", "right names"];

impl DemoReport {
    /// Writes `report.html`, `report.json` and a contact sheet for each student.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let mut page = Page::new("A diffusion transformer, made linear");
        page.paragraph(&self.introduction());
        page.table(&HEADINGS, &self.rows());
        page.paragraph(
            "Error is the mean squared error of the student's prediction against the teacher's, on names that no \
             sample used. PSNR compares whole images generated from the same noise. An image has the right name if \
             the nearest of the teacher's training images is that of its name.",
        );
        for student in &self.students {
            let sheet = png::encode(&self.sheet(student), None)?;
            clearform_weights::write_atomically(folder.join(student.file_name()), &sheet)?;
            page.heading(&student.attention).image(&sheet, &self.caption(student));
        }
        let series = |student| Series { name: StudentResult::name(student), values: &student.losses };
        let curves: Vec<Series> = self.students.iter().map(series).collect();
        page.heading("Loss")
            .svg(&chart(&curves), "Mean squared error of the prediction against the teacher's, per step.");
        if let Some(transfer) = &self.transfer {
            transfer.write(&mut page, folder)?;
        }
        clearform_weights::write_atomically(folder.join("report.json"), &serde_json::to_vec_pretty(self)?)?;
        let path = folder.join("report.html");
        clearform_weights::write_atomically(&path, page.render().as_bytes())
            .with_context(|| format!("{}", path.display()))
    }

    fn introduction(&self) -> String {
        format!(
            "A small FLUX pipeline, saved by diffusers, generates emoji from their names. Its attention was \
             replaced so that each image token attends to the text and to the image tokens within a radius; then it \
             was distilled against the original on {} images that the original generated. Total time: {:.0} seconds \
             on {} threads.",
            self.samples, self.seconds, self.threads
        )
    }

    fn caption(&self, student: &StudentResult) -> String {
        format!(
            "From top: the teacher, {0} undistilled, {0} distilled. {1}.",
            student.attention,
            self.prompts.join(", ")
        )
    }

    fn sheet(&self, student: &StudentResult) -> RgbImage {
        let rows = [&self.teacher, &student.undistilled, &student.distilled];
        contact_sheet(&rows.map(|row| row.iter().collect::<Vec<_>>()))
    }

    fn rows(&self) -> Vec<Vec<String>> {
        self.students.iter().map(|student| student.row(self.teacher_retrieval)).collect()
    }
}

impl StudentResult {
    fn name(&self) -> &str {
        &self.attention
    }

    fn file_name(&self) -> String {
        let safe = |character: char| if character.is_ascii_alphanumeric() { character } else { '-' };
        format!("{}.png", self.attention.chars().map(safe).collect::<String>())
    }

    fn row(&self, teacher_retrieval: f64) -> Vec<String> {
        vec![
            self.attention.clone(),
            self.steps.to_string(),
            format!("{:.0}", self.seconds),
            format!("{:.4}", self.error_before),
            format!("{:.4} ({:.0}%)", self.error_after, 100.0 * self.error_after / self.error_before),
            format!("{:.1} dB", self.psnr_before),
            format!("{:.1} dB", self.psnr_after),
            format!(
                "{:.0}% to {:.0}% (teacher {:.0}%)",
                100.0 * self.retrieval_before,
                100.0 * self.retrieval_after,
                100.0 * teacher_retrieval
            ),
        ]
    }
}

impl fmt::Display for DemoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<Vec<String>> = std::iter::once(HEADINGS.map(str::to_owned).to_vec()).chain(self.rows()).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        for row in &rows {
            for (column, cell) in row.iter().enumerate() {
                write!(f, "{cell:<width$}  ", width = width(column))?;
            }
            writeln!(f)?;
        }
        if let Some(transfer) = &self.transfer {
            writeln!(f, "\n{transfer}\n")?;
        }
        write!(f, "total time: {:.0} seconds on {} threads", self.seconds, self.threads)
    }
}
