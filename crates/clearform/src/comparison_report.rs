//! [`ComparisonReport`]: how similar the images of two models are, as a page and as figures.

use crate::Result;
use crate::error::WithContext as _;
use crate::evaluation::EvaluationRun;
use crate::page::Page;
use clearform_attention::AttentionPlan;
use clearform_models::Prompt;
use clearform_runtime::image_metrics::{contact_sheet, psnr, ssim};
use clearform_runtime::{RgbImage, png};
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// Images that the page shows in their own size; the figures are of all.
const SHOWN: usize = 16;

/// What the figures mean, below the page's header.
const LEGEND: &str = "PSNR is the mean squared difference of the pixels on a logarithmic scale: 30 dB and more is hard \
                      to see, 15 dB is another picture of the same thing. SSIM compares structure in small windows: 1 \
                      is equal, 0 unrelated. Both are against the teacher's picture from the same noise, so a good \
                      picture that differs in composition has low figures too.";

/// How similar the two models are.
#[derive(Debug, Clone, Serialize)]
pub struct ComparisonReport {
    /// The original.
    pub teacher: ComparedModel,
    /// The linear model.
    pub student: ComparedModel,
    /// Width and height of the images, in pixels.
    pub size: [usize; 2],
    /// Denoising steps.
    pub steps: usize,
    /// Seed of the first image.
    pub seed: u64,
    /// Mean PSNR, in dB.
    pub psnr: f64,
    /// Mean SSIM.
    pub ssim: f64,
    /// Mean PSNR and SSIM of the teacher's weights under the student's attention: what distillation began with. `None`
    /// if both have the same attention.
    pub undistilled: Option<[f64; 2]>,
    /// The teacher's time for an evaluation divided by the student's, timed in turn.
    pub speedup: f64,
    /// Each prompt.
    #[serde(rename = "pictures")]
    pub images: Vec<ImagePair>,
    /// Relative error of each layer's attention output, by layer name.
    pub attention_error: Vec<(String, f64)>,
    /// Whether the student was made from the teacher. Otherwise the undistilled images say nothing of its distillation.
    #[serde(skip)]
    is_pair: bool,
}

/// One of the models.
#[derive(Debug, Clone, Serialize)]
pub struct ComparedModel {
    /// The name of its folder or file.
    pub name: String,
    /// Its attention.
    pub attention: String,
    /// Seconds for each image, from the noise to the latents.
    pub seconds: f64,
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

/// What is measured on the models themselves.
pub(crate) struct MeasuredPair {
    /// Relative error of each layer's attention output, by layer name.
    pub attention_error: Vec<(String, f64)>,
    /// The teacher's time for an evaluation divided by the student's.
    pub speedup: f64,
    /// Whether the student was made from the teacher.
    pub is_pair: bool,
}

/// The images of the models, each in the order of the prompts.
pub(crate) struct ComparedImages {
    /// The teacher's.
    pub teacher: Vec<RgbImage>,
    /// Those of the teacher under the student's attention.
    pub undistilled: Option<Vec<RgbImage>>,
    /// The student's.
    pub student: Vec<RgbImage>,
}

impl ComparedModel {
    pub(crate) fn new(path: &Path, attention: &AttentionPlan, seconds: f64) -> Self {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Self { name, attention: attention.to_string(), seconds }
    }

    fn row(&self, role: &str, figures: Option<[f64; 2]>) -> Vec<String> {
        let figure = |index: usize, decimals: usize| {
            figures.map_or(String::new(), |figures| format!("{:.decimals$}", figures[index]))
        };
        let name = format!("{role}: {}", self.name);
        vec![name, self.attention.clone(), format!("{:.2}", self.seconds), figure(0, 2), figure(1, 3)]
    }
}

impl ImagePair {
    fn new(prompt: &Prompt, wanted: &RgbImage, got: &RgbImage) -> Result<Self> {
        Ok(Self { prompt: prompt.to_string(), psnr: psnr(wanted, got)?, ssim: ssim(wanted, got)? })
    }

    fn row(&self) -> Vec<String> {
        vec![self.prompt.clone(), format!("{:.2}", self.psnr), format!("{:.3}", self.ssim)]
    }
}

impl ComparedImages {
    /// The rows of a contact sheet: teacher, student, and the teacher under the student's attention.
    fn rows(&self) -> impl Iterator<Item = &Vec<RgbImage>> {
        [&self.teacher, &self.student].into_iter().chain(&self.undistilled)
    }

    fn sheet(&self) -> Result<Vec<u8>> {
        let rows: Vec<Vec<&RgbImage>> = self.rows().map(|row| row.iter().collect()).collect();
        Ok(png::encode(&contact_sheet(&rows), None)?)
    }

    /// The images of prompt `index`, side by side.
    fn strip(&self, index: usize) -> Result<Vec<u8>> {
        Ok(png::encode(&contact_sheet(&[self.rows().map(|row| &row[index]).collect()]), None)?)
    }
}

/// Mean PSNR and SSIM, and the figures of each prompt.
fn compared(prompts: &[Prompt], wanted: &[RgbImage], got: &[RgbImage]) -> Result<([f64; 2], Vec<ImagePair>)> {
    let pairs = prompts.iter().zip(wanted.iter().zip(got));
    let pairs = pairs.map(|(prompt, (wanted, got))| ImagePair::new(prompt, wanted, got)).collect::<Result<Vec<_>>>()?;
    let mean = |value: fn(&ImagePair) -> f64| pairs.iter().map(value).sum::<f64>() / pairs.len() as f64;
    Ok(([mean(|pair| pair.psnr), mean(|pair| pair.ssim)], pairs))
}

/// PSNR in dB by which a student is worse than undistilled before that is said: less may be rounding.
const HARM: f64 = 0.05;

impl ComparisonReport {
    /// Compares the teacher's images with the student's.
    pub(crate) fn new(
        evaluation: &EvaluationRun,
        [teacher, student]: [ComparedModel; 2],
        images: &ComparedImages,
        measured: MeasuredPair,
    ) -> Result<Self> {
        let ([psnr, ssim], pairs) = compared(&evaluation.prompts, &images.teacher, &images.student)?;
        let undistilled = images.undistilled.as_ref();
        let undistilled =
            undistilled.map(|got| -> Result<[f64; 2]> { Ok(compared(&evaluation.prompts, &images.teacher, got)?.0) });
        Ok(Self {
            speedup: measured.speedup,
            teacher,
            student,
            size: [evaluation.size.width, evaluation.size.height],
            steps: evaluation.steps,
            seed: evaluation.seed,
            psnr,
            ssim,
            undistilled: undistilled.transpose()?,
            images: pairs,
            attention_error: measured.attention_error,
            is_pair: measured.is_pair,
        })
    }

    /// Writes `report.html`, `report.json` and the contact sheet `sheet.png`.
    pub(crate) fn write(&self, folder: &Path, images: &ComparedImages) -> Result<()> {
        std::fs::create_dir_all(folder).context(folder.display())?;
        let page = self.page(images)?;
        clearform_weights::write_atomically(folder.join("sheet.png"), &images.sheet()?)?;
        clearform_weights::write_atomically(folder.join("report.json"), &serde_json::to_vec_pretty(self)?)?;
        Ok(clearform_weights::write_atomically(folder.join("report.html"), page.render().as_bytes())?)
    }

    /// What it comes to, in two sentences.
    pub fn verdict(&self) -> String {
        let likeness = match self.psnr {
            30.0.. => "draws what its teacher draws",
            20.0.. => "draws nearly what its teacher draws",
            15.0.. => "draws the same things as its teacher in other ways",
            _ => "draws other pictures than its teacher",
        };
        let gained = self.undistilled.filter(|_| self.is_pair).map_or(String::new(), |[psnr, _]| {
            match self.psnr < psnr - HARM {
                false => format!(" Undistilled it has {psnr:.1} dB."),
                true => format!(" Undistilled it has {psnr:.1} dB, so the distillation did harm."),
            }
        });
        let [width, height] = self.size;
        format!(
            "The student {likeness} ({:.1} dB, SSIM {:.3}).{gained} At {width} x {height} px it is {}.",
            self.psnr,
            self.ssim,
            self.speed()
        )
    }

    /// How fast the student is beside the teacher.
    fn speed(&self) -> String {
        match self.speedup {
            0.97..1.03 => "as fast as its teacher".to_owned(),
            1.03.. => format!("{:.2} times as fast as its teacher", self.speedup),
            _ => format!("slower than its teacher, by a factor of {:.2}", 1.0 / self.speedup),
        }
    }

    fn page(&self, images: &ComparedImages) -> Result<Page> {
        let mut page = Page::new("Teacher and student, side by side");
        let [width, height] = self.size;
        page.paragraph(&self.verdict()).paragraph(&format!(
            "{} prompts, {width} x {height} px, {} steps, seeds from {}, the same initial noise for all.",
            self.images.len(),
            self.steps,
            self.seed
        ));
        let mut rows =
            vec![self.teacher.row("teacher", None), self.student.row("student", Some([self.psnr, self.ssim]))];
        let windowed = ComparedModel { attention: self.student.attention.clone(), ..self.teacher.clone() };
        rows.extend(self.undistilled.map(|figures| {
            let mut row = windowed.row("undistilled", Some(figures));
            row[2].clear();
            row
        }));
        page.table(&["model", "attention", "s per image", "PSNR, dB", "SSIM"], &rows).paragraph(LEGEND);
        self.add_images(&mut page, images)?;
        self.add_layers(&mut page);
        Ok(page)
    }

    fn add_images(&self, page: &mut Page, images: &ComparedImages) -> Result<()> {
        let rows: Vec<_> = self.images.iter().map(ImagePair::row).collect();
        page.heading("Images").table(&["prompt", "PSNR, dB", "SSIM"], &rows);
        let last = if images.undistilled.is_some() { ", the teacher with the student's attention" } else { "" };
        page.paragraph(&format!("From left: the teacher, the student{last}."));
        for (index, pair) in self.images.iter().enumerate().take(SHOWN) {
            page.image(&images.strip(index)?, &format!("{}: {:.2} dB, SSIM {:.3}", pair.prompt, pair.psnr, pair.ssim));
        }
        Ok(())
    }

    fn add_layers(&self, page: &mut Page) {
        page.heading("Attention error per layer").paragraph(
            "How far each layer's attention output is from the teacher's at noise level 0.5, as a share of its norm: \
             0% is equal, 100% is as far as no output at all. Errors of earlier layers are included. Layers may differ \
             much while the pictures do not: later layers make up for earlier ones.",
        );
        let row = |(layer, error): &(String, f64)| vec![layer.clone(), format!("{:.1}%", 100.0 * error)];
        let rows: Vec<_> = self.attention_error.iter().map(row).collect();
        page.table(&["layer", "relative error"], &rows);
    }
}

impl fmt::Display for ComparisonReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for pair in &self.images {
            writeln!(f, "{:6.2} dB  SSIM {:.3}  {}", pair.psnr, pair.ssim, pair.prompt)?;
        }
        writeln!(f, "{:6.2} dB  SSIM {:.3}  mean of {}", self.psnr, self.ssim, self.images.len())?;
        if let Some([psnr, ssim]) = self.undistilled {
            writeln!(f, "{psnr:6.2} dB  SSIM {ssim:.3}  undistilled")?;
        }
        write!(f, "{}", self.verdict())
    }
}
