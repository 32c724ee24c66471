//! [`TransferStudy`]: what carries over from a model to its linear form: both drawn from the same noise, with nothing, with the
//! weights of a fine-tune, and under adapters that were made for the original.

use crate::commands::patch;
use crate::evaluation::EvaluationRun;
use crate::output::Output;
use crate::report::Page;
use anyhow::Context as _;
use candle_core::DType;
use clearform_attention::AttentionPlan;
use clearform_convert::PatchMode;
use clearform_portable_model::recorded_plan;
use clearform_runtime::compare::{contact_sheet, psnr, retrieve, ssim};
use clearform_runtime::{Adapters, Pipeline, PipelineOptions, RgbImage, png};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// What is compared, and how.
pub struct TransferStudy<'a> {
    /// The original.
    pub teacher: &'a Path,
    /// Its linear form.
    pub student: &'a Path,
    /// A fine-tune of the original, if there is one.
    pub fine_tune: Option<&'a Path>,
    /// What acts on both, one after another and all together; named for the report.
    pub adapters: Vec<(String, Adapters)>,
    /// What is drawn.
    pub evaluation: EvaluationRun,
    /// What controls ControlNets, made of the original's own pictures.
    pub control: &'a dyn Fn(&[RgbImage]) -> Vec<RgbImage>,
    /// How both are opened.
    pub options: PipelineOptions,
    /// Where patched models go, and the report.
    pub folder: &'a Path,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct TransferReport {
    /// Attention of the linear form.
    pub attention: String,
    /// One entry a condition; the first is that of no adapter.
    pub conditions: Vec<TransferCondition>,
    /// What was drawn.
    #[serde(skip)]
    pub prompts: Vec<String>,
}

/// Original and linear form under one condition.
#[derive(Debug, Serialize)]
pub struct TransferCondition {
    /// What acted on both.
    pub name: String,
    /// PSNR of the linear form's pictures against the original's, in dB, of the mean squared error of all.
    pub psnr: f64,
    /// Their mean SSIM.
    pub ssim: f64,
    /// Share of the linear form's pictures that, of all the original's, are nearest to their own.
    pub right: f64,
    /// Mean SSIM of the original's pictures with the condition and without: how much it does.
    pub effect: f64,
    /// The original's pictures, and the linear form's.
    #[serde(skip)]
    pub pictures: [Vec<RgbImage>; 2],
    /// What both were controlled by, if they were.
    #[serde(skip)]
    pub controls: Vec<RgbImage>,
}

/// One of the two, under a condition.
struct ModelForm<'a> {
    model: &'a Path,
    adapters: &'a Adapters,
    /// None is what the model records.
    plan: Option<AttentionPlan>,
}

impl TransferStudy<'_> {
    /// Draws under every condition.
    pub fn run(mut self, output: &Output) -> anyhow::Result<TransferReport> {
        let none = Adapters::default();
        let models = [self.teacher, self.student];
        let mut conditions = vec![self.compare("nothing", models, &none, output)?];
        for (name, model) in self.fine_tuned()? {
            let fine_tune = self.fine_tune.unwrap_or(self.teacher);
            conditions.push(self.compare(&name, [fine_tune, &model], &none, output)?);
        }
        let controls = (self.control)(&conditions[0].pictures[0]);
        for (name, adapters) in std::mem::take(&mut self.adapters) {
            self.evaluation.control_images =
                if adapters.controlnet_count() > 0 { controls.clone() } else { Vec::new() };
            conditions.push(self.compare(&name, models, &adapters, output)?);
        }
        let (first, rest) = conditions.split_at_mut(1);
        for condition in rest {
            condition.effect = mean(&first[0].pictures[0], &condition.pictures[0], ssim)?;
        }
        Ok(TransferReport { attention: self.plan()?.to_string(), conditions, prompts: self.evaluation.prompts() })
    }

    /// What the linear form records.
    fn plan(&self) -> anyhow::Result<AttentionPlan> {
        Ok(recorded_plan(self.student)?.unwrap_or_else(AttentionPlan::full))
    }

    /// Draws with an original and a linear form under one condition.
    fn compare(
        &self,
        name: &str,
        [teacher, student]: [&Path; 2],
        adapters: &Adapters,
        output: &Output,
    ) -> anyhow::Result<TransferCondition> {
        output.note(format_args!("transfer: {name}"));
        let original = self.draw(&ModelForm { model: teacher, adapters, plan: Some(AttentionPlan::full()) }, output)?;
        let linear = self.draw(&ModelForm { model: student, adapters, plan: None }, output)?;
        let nearest = retrieve(&linear, &original)?;
        let right = nearest.iter().enumerate().filter(|(own, nearest)| own == *nearest).count();
        Ok(TransferCondition {
            name: name.to_owned(),
            psnr: -10.0 * mean(&original, &linear, |a, b| Ok(10f64.powf(-psnr(a, b)? / 10.0)))?.log10(),
            ssim: mean(&original, &linear, ssim)?,
            right: right as f64 / linear.len() as f64,
            effect: 1.0,
            pictures: [original, linear],
            controls: self.evaluation.control_images.clone(),
        })
    }

    fn open(&self, side: &ModelForm) -> anyhow::Result<Pipeline> {
        let options = PipelineOptions {
            plan: side.plan.clone(),
            adapters: side.adapters.clone(),
            components: Some(self.options.components.clone().unwrap_or_else(|| self.teacher.to_owned())),
            ..self.options.clone()
        };
        Pipeline::open(side.model, options).with_context(|| format!("{}", side.model.display()))
    }

    fn draw(&self, side: &ModelForm, output: &Output) -> anyhow::Result<Vec<RgbImage>> {
        let pipeline = self.open(side)?;
        let bar = output.progress("drawing", self.evaluation.prompts.len());
        let transformer = pipeline.load_transformer(pipeline.plan(), self.options.dtype)?;
        let latents = self.evaluation.draw(&pipeline, transformer.as_ref(), &mut |count| bar.inc(count as u64))?;
        bar.finish_and_clear();
        self.evaluation.decode(&pipeline, &latents)
    }

    /// The fine-tune with the distilled attention, put in and added, as models of their own.
    fn fine_tuned(&self) -> anyhow::Result<Vec<(String, PathBuf)>> {
        let Some(fine_tune) = self.fine_tune else { return Ok(Vec::new()) };
        std::fs::create_dir_all(self.folder).with_context(|| format!("{}", self.folder.display()))?;
        let file = self.folder.join("attention.safetensors");
        patch::extract_to(self.student, self.teacher, &file)?;
        let one = |(name, mode): (&str, PatchMode)| -> anyhow::Result<(String, PathBuf)> {
            let model = self.folder.join(format!("fine-tune-{name}"));
            let base = (mode == PatchMode::Shift).then_some(self.teacher);
            patch::apply_to(&file, fine_tune, &model, mode, base)?;
            Ok((format!("fine-tune, {name}"), model))
        };
        [("replace", PatchMode::Replace), ("shift", PatchMode::Shift)].into_iter().map(one).collect()
    }
}

/// Everything is computed in f32: figures then show the attention alone, and not the rounding of bf16.
pub fn with_merged_adapters(options: PipelineOptions) -> PipelineOptions {
    PipelineOptions { dtype: Some(DType::F32), ..options }
}

fn mean(
    first: &[RgbImage],
    second: &[RgbImage],
    value: impl Fn(&RgbImage, &RgbImage) -> clearform_runtime::Result<f64>,
) -> anyhow::Result<f64> {
    let values = first.iter().zip(second).map(|(a, b)| value(a, b)).collect::<Result<Vec<_>, _>>()?;
    Ok(values.iter().sum::<f64>() / values.len().max(1) as f64)
}

const HEADINGS: [&str; 5] = ["with", "PSNR", "SSIM", "nearest to its own", "original with and without, SSIM"];
/// Pictures of a row on the page.
const SHOWN: usize = 8;

impl TransferReport {
    /// Adds a chapter to `page`, and writes its contact sheets into `folder`.
    pub fn write(&self, page: &mut Page, folder: &Path) -> anyhow::Result<()> {
        page.heading("What carries over");
        page.paragraph(&format!(
            "The original and its linear form ({}), drawn from the same noise: as they are, with the weights of a \
             fine-tune, and under adapters that were made for the original and never saw the linear form. PSNR and SSIM \
             compare the two; the last column says how much the adapter changes the original's own pictures.",
            self.attention
        ));
        page.table(&HEADINGS, &self.rows());
        for condition in &self.conditions {
            let rows = std::iter::once(&condition.controls).chain(&condition.pictures).filter(|row| !row.is_empty());
            let rows: Vec<Vec<&RgbImage>> = rows.map(|row| row.iter().take(SHOWN).collect()).collect();
            let sheet = png::encode(&contact_sheet(&rows), None)?;
            let plain = |one: char| if one.is_ascii_alphanumeric() { one } else { '-' };
            let name = format!("transfer-{}.png", condition.name.chars().map(plain).collect::<String>());
            clearform_weights::write_atomically(folder.join(name), &sheet)?;
            let prompts = self.prompts.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
            let shown = if condition.controls.is_empty() { "" } else { "What controls it; " };
            let caption = format!("With {}. {shown}the original; its linear form. {prompts}.", condition.name);
            page.picture(&sheet, &caption);
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |condition: &TransferCondition| {
            vec![
                condition.name.clone(),
                format!("{:.1} dB", condition.psnr),
                format!("{:.3}", condition.ssim),
                format!("{:.0}%", 100.0 * condition.right),
                format!("{:.3}", condition.effect),
            ]
        };
        self.conditions.iter().map(row).collect()
    }
}

impl fmt::Display for TransferReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [with, psnr, ssim, right, effect] = HEADINGS;
        writeln!(f, "{with:<28} {psnr:>9} {ssim:>7} {right:>18}   {effect}")?;
        for row in self.rows() {
            writeln!(f, "{:<28} {:>9} {:>7} {:>18}   {}", row[0], row[1], row[2], row[3], row[4])?;
        }
        write!(f, "linear form: {}", self.attention)
    }
}
