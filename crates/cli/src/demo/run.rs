//! Runs the demo with the same functions as `convert`, `generate` and `compare`.

use super::report::{DemoReport, StudentResult};
use super::{embedded, transfer};
use anyhow::Context as _;
use candle_core::{DType, Device, Tensor};
use clearform::evaluation::EvaluationRun;
use clearform::{
    AttentionPlan, ConvertOptions, Observer, Overwrite, Pipeline, PipelineOptions, PluginOptions, Prompt, Radius,
    RgbImage, TrainingOptions, convert, prepare_samples,
};
use clearform_distill::prediction_error;
use clearform_models::{Denoiser, DenoiserInput};
use clearform_runtime::image_metrics::{psnr_of_all, retrieve};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What the demo does.
#[derive(Debug, Clone)]
pub struct DemoSettings {
    /// Folder of the models and the report.
    pub folder: PathBuf,
    /// Optimizer steps for each student.
    pub steps: usize,
    /// The students' radius and pooling. The adapters are applied to the last student.
    pub plans: Vec<(Radius, Option<usize>)>,
    /// Where plugins are.
    pub plugins: PluginOptions,
}

const SAMPLES: usize = 128;
/// Fewer than [`IMAGE_STEPS`]: samples are training data, of which the number counts more than fine detail.
const SAMPLE_STEPS: usize = 12;
const IMAGE_STEPS: usize = 20;
/// Every 8th name is held out: no sample uses it, and all figures are measured on it.
const HELD_OUT_STRIDE: usize = 8;
/// Seed of the first image; the samples have other seeds.
const SEED: u64 = 10_000;
/// Edge of a training image on the reference sheet, in pixels, and the number of them in a row.
const TILE: u32 = 32;
const TILES_PER_ROW: u32 = 16;
/// Noise levels at which the prediction error is measured: the centres of four equal intervals of [0, 1].
const NOISE_LEVELS: [f64; 4] = [0.125, 0.375, 0.625, 0.875];

/// Runs the demo and returns its results.
///
/// # Errors
/// If the folder cannot be written, or a conversion or the transfer study fails.
pub fn run(settings: &DemoSettings, observer: &mut dyn Observer) -> anyhow::Result<DemoReport> {
    let begun = Instant::now();
    let assets = settings.folder.join("mini-flux");
    std::fs::create_dir_all(&assets).with_context(|| format!("{}", assets.display()))?;
    embedded::unpack(&assets)?;
    let base = assets.join("base");
    let held_out = HeldOutSet::new(&base, observer)?;
    let (samples, sample_seconds) = generate_samples(settings, &held_out.pipeline, observer)?;
    let mut students = Vec::new();
    for plan in &settings.plans {
        students.push(held_out.distill_student(settings, [&base, &samples], *plan, observer)?);
    }
    let transfer = match settings.plans.last() {
        Some((radius, pool)) => {
            let student = settings.folder.join(model_name(*radius, *pool));
            transfer::run(&assets, &student, held_out.evaluation.clone(), &settings.plugins, observer)?
        }
        None => None,
    };
    Ok(DemoReport {
        version: env!("CARGO_PKG_VERSION"),
        threads: rayon::current_num_threads(),
        sample_seconds,
        samples: SAMPLES,
        teacher_retrieval: held_out.retrieval(&held_out.images)?,
        students,
        transfer,
        seconds: begun.elapsed().as_secs_f64(),
        prompts: held_out.evaluation.prompt_texts(),
        teacher: held_out.images,
    })
}

/// Opens a model in f32: differences then come from the attention alone, not from bf16 rounding.
fn open(model: &Path) -> anyhow::Result<Pipeline> {
    let options = PipelineOptions { dtype: Some(DType::F32), ..PipelineOptions::default_options()? };
    Ok(Pipeline::open(model, options)?)
}

/// The embedded model's prompts, either those that are held out or the others.
fn names(wanted: fn(usize) -> bool) -> impl Iterator<Item = &'static str> {
    embedded::NAMES.lines().enumerate().filter(move |(index, _)| wanted(*index)).map(|(_, name)| name)
}

fn is_held_out(index: usize) -> bool {
    index % HELD_OUT_STRIDE == HELD_OUT_STRIDE / 2
}

/// Generates samples of the names that are not held out. Returns their folder and the seconds it took.
fn generate_samples(
    settings: &DemoSettings,
    teacher: &Pipeline,
    observer: &mut dyn Observer,
) -> anyhow::Result<(PathBuf, f64)> {
    let begun = Instant::now();
    let prompts = settings.folder.join("prompts.txt");
    let training_names: Vec<&str> = names(|index| !is_held_out(index)).collect();
    std::fs::write(&prompts, training_names.join("\n"))?;
    let folder = settings.folder.join("samples");
    let training = TrainingOptions {
        prompts: Some(prompts),
        sample_count: Some(SAMPLES),
        sample_steps: Some(SAMPLE_STEPS),
        ..training_options(settings)
    };
    prepare_samples(teacher, &training, &folder, observer)?;
    Ok((folder, begun.elapsed().as_secs_f64()))
}

fn training_options(settings: &DemoSettings) -> TrainingOptions {
    TrainingOptions {
        steps: Some(settings.steps),
        checkpoint_every: 100,
        held_out: 0, // the demo judges on names of its own
        ..TrainingOptions::default()
    }
}

/// The held-out names, and what the teacher generates for them.
struct HeldOutSet {
    pipeline: Pipeline,
    teacher: Box<dyn Denoiser>,
    evaluation: EvaluationRun,
    /// The teacher's images.
    images: Vec<RgbImage>,
    /// The teacher's latents at [`NOISE_LEVELS`], on which predictions are compared.
    inputs: Vec<DenoiserInput>,
    /// The training images of all names.
    references: Vec<RgbImage>,
}

impl HeldOutSet {
    fn new(base: &Path, observer: &mut dyn Observer) -> anyhow::Result<Self> {
        let pipeline = open(base)?;
        let evaluation = EvaluationRun {
            prompts: names(is_held_out).map(|name| Prompt::Text(name.to_owned())).collect(),
            size: pipeline.native_size(),
            steps: IMAGE_STEPS,
            guidance: 0.0,
            seed: SEED,
            control_images: Vec::new(),
        };
        let teacher = pipeline.load_transformer(&AttentionPlan::full(), Some(DType::F32))?;
        let latents = evaluation.watched_latents(&pipeline, teacher.as_ref(), observer)?;
        let images = evaluation.decode(&pipeline, &latents)?;
        let inputs = noised_inputs(&evaluation, &pipeline, &latents)?;
        Ok(Self { references: references()?, pipeline, teacher, evaluation, images, inputs })
    }

    /// Converts and distils one student, and evaluates it before and after.
    fn distill_student(
        &self,
        settings: &DemoSettings,
        [base, samples]: [&Path; 2],
        (radius, pool): (Radius, Option<usize>),
        observer: &mut dyn Observer,
    ) -> anyhow::Result<StudentResult> {
        let plan = AttentionPlan::clear(radius, pool);
        observer.note(&format!("{plan}: evaluating before distillation"));
        let before = self.evaluate(self.pipeline.load_transformer(&plan, Some(DType::F32))?.as_ref(), observer)?;
        let model = settings.folder.join(model_name(radius, pool));
        let begun = Instant::now();
        observer.note(&format!("{plan}: converting and distilling"));
        let training = TrainingOptions { samples: Some(samples.to_owned()), ..training_options(settings) };
        let options = ConvertOptions {
            attention: plan.clone(),
            training: Some(training),
            overwrite: Overwrite::PortableModel,
            ..ConvertOptions::new(base, &model)
        };
        let converted = convert(&options, observer)?;
        let seconds = begun.elapsed().as_secs_f64();
        let student = open(&model)?;
        let after = self.evaluate(student.load_transformer(student.plan(), Some(DType::F32))?.as_ref(), observer)?;
        Ok(StudentResult {
            attention: plan.to_string(),
            radius: radius.tokens(),
            pool,
            steps: settings.steps,
            seconds,
            error_before: before.error,
            error_after: after.error,
            psnr_before: before.psnr,
            psnr_after: after.psnr,
            retrieval_before: self.retrieval(&before.images)?,
            retrieval_after: self.retrieval(&after.images)?,
            losses: converted.losses.iter().map(|entry| entry.losses.total).collect(),
            undistilled: before.images,
            distilled: after.images,
        })
    }

    /// Compares the student's predictions and images with the teacher's.
    fn evaluate(&self, student: &dyn Denoiser, observer: &mut dyn Observer) -> anyhow::Result<HeldOutScores> {
        let error = prediction_error(self.teacher.as_ref(), student, &self.inputs)?;
        let latents = self.evaluation.watched_latents(&self.pipeline, student, observer)?;
        let images = self.evaluation.decode(&self.pipeline, &latents)?;
        let psnr = psnr_of_all(&self.images, &images)?;
        Ok(HeldOutScores { error, psnr, images })
    }

    /// Share of images whose nearest training image is that of their name.
    fn retrieval(&self, images: &[RgbImage]) -> anyhow::Result<f64> {
        let nearest = retrieve(images, &self.references)?;
        let expected = (0..self.references.len()).filter(|index| is_held_out(*index));
        let retrieved = nearest.iter().zip(expected).filter(|(nearest, expected)| **nearest == *expected).count();
        Ok(retrieved as f64 / images.len() as f64)
    }
}

/// How a student does on the held-out names.
struct HeldOutScores {
    /// Mean squared error of the prediction against the teacher's.
    error: f64,
    /// PSNR of all images together against the teacher's, in dB.
    psnr: f64,
    images: Vec<RgbImage>,
}

/// The teacher's latents at each of [`NOISE_LEVELS`], all with the same noise.
fn noised_inputs(
    evaluation: &EvaluationRun,
    pipeline: &Pipeline,
    latents: &Tensor,
) -> anyhow::Result<Vec<DenoiserInput>> {
    let count = evaluation.prompts.len();
    let halfway = evaluation.halfway_input(pipeline, latents, count)?;
    // At level 0.5 the input is (latents + noise) / 2.
    let noise = ((&halfway.latents * 2.0)? - latents)?;
    let noised = |level: f64| -> anyhow::Result<DenoiserInput> {
        let noised = ((latents * (1.0 - level))? + (&noise * level)?)?;
        let timestep = Tensor::full(level as f32, count, &Device::Cpu)?;
        Ok(DenoiserInput { latents: noised, timestep, ..halfway.clone() })
    };
    NOISE_LEVELS.into_iter().map(noised).collect()
}

/// The training images of all names, enlarged to the size of generated images.
fn references() -> anyhow::Result<Vec<RgbImage>> {
    let sheet = image::load_from_memory(embedded::REFERENCES)?.to_rgb8();
    let reference = |index: u32| {
        let column = index % TILES_PER_ROW;
        let row = index / TILES_PER_ROW;
        let tile = image::imageops::crop_imm(&sheet, column * TILE, row * TILE, TILE, TILE).to_image();
        image::imageops::resize(&tile, 4 * TILE, 4 * TILE, image::imageops::FilterType::Nearest)
    };
    Ok((0..names(|_| true).count() as u32).map(reference).collect())
}

fn model_name(radius: Radius, pool: Option<usize>) -> String {
    let pool = pool.map_or(String::new(), |pool| format!("-d{pool}"));
    format!("mini-flux-r{}{pool}", radius.tokens())
}
