//! [`transfer`] and [`TransferStudy`]: what carries over from a model to its linear version. Both generate images from the
//! same noise: alone, with the weights of a fine-tune, and with adapters that were trained for the original.

use crate::adapters::{AdapterOptions, note_reports};
use crate::compared_pair::{ComparedPair, PairMember};
use crate::error::WithContext as _;
use crate::evaluation::{EvaluationOptions, EvaluationRun};
use crate::observer::{Observer, note};
use crate::output_place::{Existing, prepare_report};
use crate::page::Page;
use crate::patch::{PatchOptions, apply_patch, extract_patch};
use crate::sources::{Opening, default_options, linear_plan, open_transformer};
use crate::{ClearformError, ComputeDevice, Result};
use candle_core::DType;
use clearform_attention::AttentionPlan;
use clearform_convert::PatchMode;
use clearform_portable_model::{Overwrite, recorded_plan};
use clearform_runtime::image_metrics::{contact_sheet, psnr, retrieve, ssim};
use clearform_runtime::{Adapters, Pipeline, PipelineOptions, RgbImage, png};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// What [`transfer`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferOptions {
    /// The original model.
    pub teacher: PathBuf,
    /// Its linear model.
    pub student: PathBuf,
    /// Folder of the report and the patched fine-tunes.
    pub output: PathBuf,
    /// A fine-tune of the original; the distilled attention is applied to it.
    #[serde(default)]
    pub fine_tune: Option<PathBuf>,
    /// What both generate. Control images are for ControlNets, and for transformers that take one themselves.
    #[serde(default)]
    pub evaluation: EvaluationOptions,
    /// Adapters applied to both: the LoRAs, the ControlNets, and all together.
    #[serde(default)]
    pub adapters: AdapterOptions,
    /// Where both run.
    #[serde(default)]
    pub device: ComputeDevice,
    /// Whether an earlier report in the folder is replaced.
    #[serde(default)]
    pub replace: bool,
}

impl TransferOptions {
    /// Compares `student` with `teacher` without adapters, and writes the report to `output`.
    pub fn new(teacher: impl Into<PathBuf>, student: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            teacher: teacher.into(),
            student: student.into(),
            output: output.into(),
            fine_tune: None,
            evaluation: EvaluationOptions::default(),
            adapters: AdapterOptions::default(),
            device: ComputeDevice::default(),
            replace: false,
        }
    }
}

impl TransferOptions {
    /// Refuses models in the wrong order, and notes that the student was made from another teacher.
    fn check_pair(&self, teacher: &Pipeline, observer: &mut dyn Observer) -> Result<()> {
        let transformer = open_transformer(&self.student)?;
        let plan = recorded_plan(&self.student)?.unwrap_or_else(AttentionPlan::full);
        let teacher = PairMember::new(&self.teacher, teacher);
        let student = PairMember { path: &self.student, plan: &plan, transformer: &transformer };
        ComparedPair { teacher, student }.check(observer).map(drop)
    }

    /// Refuses a fine-tune to which the distilled attention cannot be applied.
    fn check_fine_tune(&self, teacher: &Pipeline) -> Result<()> {
        let Some(path) = &self.fine_tune else { return Ok(()) };
        let plan = linear_plan(path)?;
        let fine_tune = open_transformer(path)?;
        let [found, expected] = [&fine_tune, teacher.transformer()].map(|model| &model.identified().family);
        let reason = match plan {
            Some(plan) => format!("is a linear model already (attention {plan})"),
            None if found != expected => {
                format!("is a model of the family {found}, and the original is one of {expected}")
            }
            None => return Ok(()),
        };
        Err(ClearformError::bad_option(format!(
            "--fine-tune {}: {reason}; expected a fine-tune of the original",
            path.display()
        )))
    }
}

/// Measures what carries over from a model to its linear version, by default on a CPU in f32: differences then come
/// from the attention alone, not from bf16 rounding. Writes `report.html`, `report.json` and contact sheets.
///
/// # Errors
/// A model or adapter cannot be opened, the fine-tune cannot be patched, or the report cannot be written;
/// [`ClearformError::Cancelled`].
///
/// # Example
/// ```no_run
/// use clearform::{AdapterKind, AdapterOptions, AdapterSpec, TransferOptions, transfer};
///
/// let style = AdapterSpec::new("style.safetensors", AdapterKind::Lora);
/// let options = TransferOptions {
///     adapters: AdapterOptions::new([style]),
///     ..TransferOptions::new("FLUX.1-dev", "FLUX.1-dev-clear", "report")
/// };
/// println!("{}", transfer(&options, &mut ())?);
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn transfer(options: &TransferOptions, observer: &mut dyn Observer) -> Result<TransferReport> {
    let folder = &options.output;
    let TransferOptions { evaluation, device, .. } = options;
    let opening = Opening { components: evaluation.extra_components(), device: *device, memory: evaluation.memory };
    let opening = in_exact_dtype(default_options(opening)?);
    let _made = prepare_report(folder, options.replace)?;
    let teacher = Pipeline::open(&options.teacher, opening.clone())?;
    options.check_pair(&teacher, observer)?;
    options.adapters.without_effect().iter().for_each(|text| note(observer, text));
    options.check_fine_tune(&teacher)?;
    let evaluation = EvaluationRun::new(&options.evaluation, &teacher)?;
    evaluation.check_control_images(teacher.takes_control() || options.adapters.may_take_control())?;
    let control_images = evaluation.control_images.clone();
    let study = TransferStudy {
        teacher: &options.teacher,
        student: &options.student,
        fine_tune: options.fine_tune.as_deref(),
        adapters: adapter_sets(&options.adapters, &control_images)?,
        evaluation,
        control_images: &|_| control_images.clone(),
        options: opening,
        folder,
    };
    let report = study.run(observer)?;
    let mut page = Page::new("What carries over to the linear model");
    report.write(&mut page, folder)?;
    let write = |name: &str, bytes: &[u8]| clearform_weights::write_atomically(folder.join(name), bytes);
    write("report.json", &serde_json::to_vec_pretty(&report)?)?;
    write("report.html", page.render().as_bytes())?;
    Ok(report)
}

/// The LoRAs, the ControlNets, and both together.
fn adapter_sets(options: &AdapterOptions, control_images: &[RgbImage]) -> Result<Vec<(String, Adapters)>> {
    let all = options.open()?;
    if all.controlnet_count() > 0 && control_images.is_empty() {
        let reason = "--control-image: expected one image, or one for each prompt, for the ControlNets, found none";
        return Err(ClearformError::bad_option(reason));
    }
    let weights = all.only_weights();
    let controlnets = all.only_controlnets();
    let has_both = !weights.is_empty() && !controlnets.is_empty();
    let named = [("LoRA", weights), ("ControlNet", controlnets)].map(|(name, adapters)| (name.to_owned(), adapters));
    let both = has_both.then(|| ("LoRA and ControlNet".to_owned(), all));
    Ok(named.into_iter().filter(|(_, adapters)| !adapters.is_empty()).chain(both).collect())
}

/// What is compared, and how.
pub struct TransferStudy<'a> {
    /// The original.
    pub teacher: &'a Path,
    /// Its linear model.
    pub student: &'a Path,
    /// A fine-tune of the original, if there is one.
    pub fine_tune: Option<&'a Path>,
    /// Sets of adapters that are applied to both, one after the other, with their names in the report.
    pub adapters: Vec<(String, Adapters)>,
    /// What both generate. Its control images are those of transformers that take one themselves.
    pub evaluation: EvaluationRun,
    /// Control images of ControlNets, given the original's images without adapters.
    pub control_images: &'a dyn Fn(&[RgbImage]) -> Vec<RgbImage>,
    /// How both are opened.
    pub options: PipelineOptions,
    /// Where the patched models and the report are written.
    pub folder: &'a Path,
}

/// The result of a [`TransferStudy`].
#[derive(Debug, Serialize)]
pub struct TransferReport {
    /// Attention plan of the linear model.
    pub attention: String,
    /// One entry per condition; the first is without adapters.
    pub conditions: Vec<TransferCondition>,
    /// The prompts of the images.
    #[serde(skip)]
    pub prompts: Vec<String>,
}

/// Original and linear model under one condition.
#[derive(Debug, Serialize)]
pub struct TransferCondition {
    /// What was applied to both.
    pub name: String,
    /// PSNR of the linear model's images against the original's, in dB, from the mean squared error over all of them.
    pub psnr: f64,
    /// Their mean SSIM.
    pub ssim: f64,
    /// Share of the linear model's images whose nearest among the original's images is that of the same prompt.
    #[serde(rename = "right")]
    pub retrieval: f64,
    /// Mean SSIM between the original's images with and without the condition: the lower, the stronger its effect.
    pub effect: f64,
    /// The original's images, and the linear model's.
    #[serde(skip)]
    pub images: [Vec<RgbImage>; 2],
    /// The control images; empty without a ControlNet.
    #[serde(skip)]
    pub control_images: Vec<RgbImage>,
}

/// A model as it generates images under one condition.
struct ModelForm<'a> {
    model: &'a Path,
    adapters: &'a Adapters,
    /// The plan that the model records if there is none.
    plan: Option<AttentionPlan>,
}

impl TransferStudy<'_> {
    /// Generates images under every condition and compares them.
    ///
    /// # Errors
    /// If a model or adapter cannot be opened, or the fine-tune cannot be patched.
    pub fn run(mut self, observer: &mut dyn Observer) -> Result<TransferReport> {
        let none = Adapters::default();
        let models = [self.teacher, self.student];
        let mut conditions = vec![self.compare("nothing", models, &none, observer)?];
        for (name, model) in self.fine_tuned(observer)? {
            let fine_tune = self.fine_tune.unwrap_or(self.teacher);
            conditions.push(self.compare(&name, [fine_tune, &model], &none, observer)?);
        }
        let own_control_images = self.evaluation.control_images.clone();
        let control_images = (self.control_images)(&conditions[0].images[0]);
        for (name, adapters) in std::mem::take(&mut self.adapters) {
            self.evaluation.control_images =
                if adapters.controlnet_count() > 0 { control_images.clone() } else { own_control_images.clone() };
            conditions.push(self.compare(&name, models, &adapters, observer)?);
        }
        let (first, rest) = conditions.split_at_mut(1);
        for condition in rest {
            condition.effect = mean(&first[0].images[0], &condition.images[0], ssim)?;
        }
        Ok(TransferReport { attention: self.plan()?.to_string(), conditions, prompts: self.evaluation.prompt_texts() })
    }

    /// The plan that the linear model records.
    fn plan(&self) -> Result<AttentionPlan> {
        Ok(recorded_plan(self.student)?.unwrap_or_else(AttentionPlan::full))
    }

    /// Generates images with an original and a linear model under one condition.
    fn compare(
        &self,
        name: &str,
        [teacher, student]: [&Path; 2],
        adapters: &Adapters,
        observer: &mut dyn Observer,
    ) -> Result<TransferCondition> {
        note(observer, format_args!("transfer: {name}"));
        let full = Some(AttentionPlan::full());
        let original = self.generate(&ModelForm { model: teacher, adapters, plan: full }, observer)?;
        let linear = self.generate(&ModelForm { model: student, adapters, plan: None }, observer)?;
        let nearest = retrieve(&linear, &original)?;
        let retrieved = nearest.iter().enumerate().filter(|(index, nearest)| index == *nearest).count();
        Ok(TransferCondition {
            name: name.to_owned(),
            psnr: -10.0 * mean(&original, &linear, |a, b| Ok(10f64.powf(-psnr(a, b)? / 10.0)))?.log10(),
            ssim: mean(&original, &linear, ssim)?,
            retrieval: retrieved as f64 / linear.len() as f64,
            effect: 1.0,
            images: [original, linear],
            control_images: if adapters.controlnet_count() > 0 {
                self.evaluation.control_images.clone()
            } else {
                Vec::new()
            },
        })
    }

    fn open(&self, form: &ModelForm) -> Result<Pipeline> {
        let options = PipelineOptions {
            plan: form.plan.clone(),
            adapters: form.adapters.clone(),
            components: Some(self.options.components.clone().unwrap_or_else(|| self.teacher.to_owned())),
            ..self.options.clone()
        };
        Pipeline::open(form.model, options).context(form.model.display())
    }

    fn generate(&self, form: &ModelForm, observer: &mut dyn Observer) -> Result<Vec<RgbImage>> {
        let pipeline = self.open(form)?;
        note_reports(pipeline.adapter_reports(), pipeline.controlnets(), observer);
        let transformer = pipeline.load_transformer(pipeline.plan(), self.options.dtype)?;
        let latents = self.evaluation.watched_latents(&pipeline, transformer.as_ref(), observer)?;
        self.evaluation.decode(&pipeline, &latents)
    }

    /// Writes the fine-tune with the distilled attention, in both modes. Returns the names and folders of the models.
    fn fine_tuned(&self, observer: &mut dyn Observer) -> Result<Vec<(String, PathBuf)>> {
        let Some(fine_tune) = self.fine_tune else { return Ok(Vec::new()) };
        std::fs::create_dir_all(self.folder).context(self.folder.display())?;
        let file = self.folder.join("attention.safetensors");
        extract_patch(self.student, self.teacher, &file, Existing::Replace, observer)?;
        let mut models = Vec::new();
        for (name, mode) in [("replace", PatchMode::Replace), ("shift", PatchMode::Shift)] {
            let output = self.folder.join(format!("fine-tune-{name}"));
            let base = (mode == PatchMode::Shift).then(|| self.teacher.to_owned());
            let overwrite = Overwrite::PortableModel;
            apply_patch(
                &PatchOptions { mode, base, overwrite, ..PatchOptions::new(&file, fine_tune, &output) },
                observer,
            )?;
            models.push((format!("fine-tune, {name}"), output));
        }
        Ok(models)
    }
}

/// `options` with f32 on a CPU: differences then come from the attention alone, not from bf16 rounding. On a GPU, attention
/// is computed in 16 bits.
fn in_exact_dtype(options: PipelineOptions) -> PipelineOptions {
    let dtype = if options.device.is_cpu() { Some(DType::F32) } else { options.dtype };
    PipelineOptions { dtype, ..options }
}

fn mean(
    first: &[RgbImage],
    second: &[RgbImage],
    value: impl Fn(&RgbImage, &RgbImage) -> clearform_runtime::Result<f64>,
) -> Result<f64> {
    let values = first.iter().zip(second).map(|(a, b)| value(a, b)).collect::<clearform_runtime::Result<Vec<_>>>()?;
    Ok(values.iter().sum::<f64>() / values.len().max(1) as f64)
}

const HEADINGS: [&str; 5] =
    ["with", "PSNR", "SSIM", "matched to the right image", "effect on original (SSIM with vs without)"];
/// Images per row of a contact sheet: as many as are legible at the page's width.
const SHEET_COLUMNS: usize = 8;

impl TransferReport {
    /// Adds a section to `page`, and writes its contact sheets to `folder`.
    pub fn write(&self, page: &mut Page, folder: &Path) -> Result<()> {
        page.heading("What carries over");
        page.paragraph(&format!(
            "Images of the original and its linear model ({}) from the same noise: of the models alone, with the weights \
             of a fine-tune, and with adapters that were trained for the original, not for the linear model. PSNR and SSIM \
             compare the two models; the last column shows how much the adapter changes the original's images.",
            self.attention
        ));
        page.table(&HEADINGS, &self.rows());
        for condition in &self.conditions {
            let sheet = condition.sheet()?;
            clearform_weights::write_atomically(folder.join(condition.file_name()), &sheet)?;
            page.image(&sheet, &condition.caption(&self.prompts));
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |condition: &TransferCondition| {
            vec![
                condition.name.clone(),
                format!("{:.1} dB", condition.psnr),
                format!("{:.3}", condition.ssim),
                format!("{:.0}%", 100.0 * condition.retrieval),
                format!("{:.3}", condition.effect),
            ]
        };
        self.conditions.iter().map(row).collect()
    }
}

impl TransferCondition {
    /// A PNG with rows of control images (if there are any), the original's images and the linear model's.
    fn sheet(&self) -> Result<Vec<u8>> {
        let rows = std::iter::once(&self.control_images).chain(&self.images).filter(|row| !row.is_empty());
        let rows: Vec<Vec<&RgbImage>> = rows.map(|row| row.iter().take(SHEET_COLUMNS).collect()).collect();
        Ok(png::encode(&contact_sheet(&rows), None)?)
    }

    fn file_name(&self) -> String {
        let safe = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '-' };
        format!("transfer-{}.png", self.name.chars().map(safe).collect::<String>())
    }

    fn caption(&self, prompts: &[String]) -> String {
        let prompts = prompts.iter().take(SHEET_COLUMNS).cloned().collect::<Vec<_>>().join(", ");
        let controls = if self.control_images.is_empty() { "" } else { "the control images, " };
        format!("With {}. From top: {controls}the original, its linear model. {prompts}.", self.name)
    }
}

impl fmt::Display for TransferReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [with, psnr, ssim, retrieval, effect] = HEADINGS;
        writeln!(f, "{with:<28} {psnr:>9} {ssim:>7} {retrieval:>24}   {effect}")?;
        for row in self.rows() {
            writeln!(f, "{:<28} {:>9} {:>7} {:>24}   {}", row[0], row[1], row[2], row[3], row[4])?;
        }
        write!(f, "linear model: {}", self.attention)
    }
}
