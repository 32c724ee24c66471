//! The story itself, chapter by chapter, through the same doors as `convert`, `generate` and `compare`.

use super::report::{DemoReport, StudentResult};
use super::{embedded, transfer};
use crate::args::{ConvertArgs, DeviceArg, PluginSearchArgs, SourceArgs, TrainingArgs, WeightAdapterArgs};
use crate::commands::convert;
use crate::distillation;
use crate::evaluation::EvaluationRun;
use crate::output::Output;
use crate::sources::plainly;
use anyhow::Context as _;
use candle_core::{DType, Device, Tensor};
use clearform_attention::{AttentionPlan, Radius};
use clearform_distill::{SampleSet, prediction_error};
use clearform_models::{Denoiser, DenoiserInput, Prompt};
use clearform_runtime::compare::{psnr, retrieve};
use clearform_runtime::{Pipeline, PipelineOptions, RgbImage};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What the demo does.
#[derive(Debug, Clone)]
pub struct DemoSettings {
    /// Where everything goes.
    pub folder: PathBuf,
    /// Optimizer steps for each student.
    pub steps: usize,
    /// The students' attention. The last one meets the adapters.
    pub plans: Vec<(Radius, Option<usize>)>,
    /// Where plugins are.
    pub plugins: PluginSearchArgs,
}

const SAMPLES: usize = 128;
const SAMPLE_STEPS: usize = 12;
const PICTURE_STEPS: usize = 20;
/// Every how many-th name is held out: no sample is of it, and all figures are.
const HELD_OUT: usize = 8;
/// Seed of the pictures; samples have others.
const SEED: u64 = 10_000;
/// Edge of a reference picture's tile, and how many stand in a row.
const TILE: u32 = 32;
const TILES: u32 = 16;

/// Tells the story and gives what it found.
pub fn run(settings: &DemoSettings, output: &Output) -> anyhow::Result<DemoReport> {
    let begun = Instant::now();
    let assets = settings.folder.join("mini-flux");
    std::fs::create_dir_all(&assets).with_context(|| format!("{}", assets.display()))?;
    embedded::unpack(&assets)?;
    let base = assets.join("base");
    let exam = HeldOutSet::new(&base, output)?;
    let (samples, sample_seconds) = draw_samples(settings, &exam.pipeline, output)?;
    let graduate = |plan: &(Radius, Option<usize>)| exam.distill_student(settings, &base, &samples, *plan, output);
    let students = settings.plans.iter().map(graduate).collect::<anyhow::Result<Vec<_>>>()?;
    let transfer = match settings.plans.last() {
        Some((radius, pool)) => {
            let student = settings.folder.join(model_name(*radius, *pool));
            transfer::run(&assets, &student, exam.evaluation.clone(), &settings.plugins, output)?
        }
        None => None,
    };
    Ok(DemoReport {
        version: env!("CARGO_PKG_VERSION"),
        threads: rayon::current_num_threads(),
        sample_seconds,
        samples: SAMPLES,
        teacher_retrieval: exam.retrieval(&exam.pictures)?,
        students,
        transfer,
        seconds: begun.elapsed().as_secs_f64(),
        prompts: exam.evaluation.prompts(),
        teacher: exam.pictures,
    })
}

/// Everything is computed in f32: figures then show the attention alone, and not the rounding of bf16.
fn open(model: &Path) -> anyhow::Result<Pipeline> {
    Ok(Pipeline::open(model, PipelineOptions { dtype: Some(DType::F32), ..plainly(None, DeviceArg::Cpu)? })?)
}

fn names() -> Vec<String> {
    embedded::NAMES.lines().map(str::to_owned).collect()
}

fn is_held_out(index: usize) -> bool {
    index % HELD_OUT == HELD_OUT / 2
}

fn draw_samples(settings: &DemoSettings, teacher: &Pipeline, output: &Output) -> anyhow::Result<(PathBuf, f64)> {
    let begun = Instant::now();
    let prompts = settings.folder.join("prompts.txt");
    let told: Vec<String> = names().into_iter().enumerate().filter(|(i, _)| !is_held_out(*i)).map(|(_, n)| n).collect();
    std::fs::write(&prompts, told.join("\n"))?;
    let folder = settings.folder.join("samples");
    let _: SampleSet = distillation::samples(teacher, &training(settings, Some(prompts)), &folder, output)?;
    Ok((folder, begun.elapsed().as_secs_f64()))
}

fn training(settings: &DemoSettings, prompts: Option<PathBuf>) -> TrainingArgs {
    TrainingArgs {
        components: None,
        prompts,
        samples: None,
        sample_count: SAMPLES,
        sample_steps: Some(SAMPLE_STEPS),
        sample_size: None,
        steps: settings.steps,
        batch: 8,
        accumulate: 1,
        lr: 1.4e-3,
        attention_every: 2,
        keep_activations: true,
        checkpoint_every: 100,
        seed: 0,
        resume: false,
        device: DeviceArg::Cpu,
    }
}

/// The names that no sample is of, and what the teacher makes of them.
struct HeldOutSet {
    pipeline: Pipeline,
    teacher: Box<dyn Denoiser>,
    evaluation: EvaluationRun,
    pictures: Vec<RgbImage>,
    questions: Vec<DenoiserInput>,
    references: Vec<RgbImage>,
}

impl HeldOutSet {
    fn new(base: &Path, output: &Output) -> anyhow::Result<Self> {
        let pipeline = open(base)?;
        let prompts = names().into_iter().enumerate().filter(|(index, _)| is_held_out(*index)).map(|(_, name)| name);
        let evaluation = EvaluationRun {
            prompts: prompts.map(Prompt::Text).collect(),
            size: pipeline.native_size(),
            steps: PICTURE_STEPS,
            guidance: 0.0,
            seed: SEED,
            control_images: Vec::new(),
        };
        let teacher = pipeline.load_transformer(&AttentionPlan::full(), Some(DType::F32))?;
        let latents = draw(&pipeline, teacher.as_ref(), &evaluation, output)?;
        let pictures = evaluation.decode(&pipeline, &latents)?;
        let questions = halfway_inputs(&evaluation, &pipeline, &latents)?;
        Ok(Self { references: references()?, pipeline, teacher, evaluation, pictures, questions })
    }

    /// Converts and distils one student and examines it before and after.
    fn distill_student(
        &self,
        settings: &DemoSettings,
        base: &Path,
        samples: &Path,
        (radius, pool): (Radius, Option<usize>),
        output: &Output,
    ) -> anyhow::Result<StudentResult> {
        let plan = AttentionPlan::clear(radius, pool);
        output.note(format_args!("{plan}: undistilled"));
        let before = self.evaluate(self.pipeline.load_transformer(&plan, Some(DType::F32))?.as_ref(), output)?;
        let model = settings.folder.join(model_name(radius, pool));
        let begun = Instant::now();
        output.note(format_args!("{plan}: converting and distilling"));
        let args = conversion(settings, base, &model, samples);
        let converted = convert::convert(&args, &plan, output)?;
        let seconds = begun.elapsed().as_secs_f64();
        let student = open(&model)?;
        let after = self.evaluate(student.load_transformer(student.plan(), Some(DType::F32))?.as_ref(), output)?;
        let entries = converted.trained.map(|trained| trained.distilled.entries).unwrap_or_default();
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
            retrieval_before: self.retrieval(&before.pictures)?,
            retrieval_after: self.retrieval(&after.pictures)?,
            losses: entries.iter().map(|entry| entry.losses.total).collect(),
            undistilled: before.pictures,
            distilled: after.pictures,
        })
    }

    fn evaluate(&self, student: &dyn Denoiser, output: &Output) -> anyhow::Result<HeldOutScores> {
        let error = prediction_error(self.teacher.as_ref(), student, &self.questions)?;
        let latents = draw(&self.pipeline, student, &self.evaluation, output)?;
        let pictures = self.evaluation.decode(&self.pipeline, &latents)?;
        let pairs = self.pictures.iter().zip(&pictures);
        let each = pairs.map(|(wanted, got)| psnr(wanted, got)).collect::<Result<Vec<_>, _>>()?;
        // The mean of mean squared errors, as the PSNR of all pictures together.
        let error_of = |psnr: &f64| 10f64.powf(-psnr / 10.0);
        let psnr = -10.0 * (each.iter().map(error_of).sum::<f64>() / each.len() as f64).log10();
        Ok(HeldOutScores { error, psnr, pictures })
    }

    /// Share of pictures that are nearest, of all reference pictures, to that of their own name.
    fn retrieval(&self, pictures: &[RgbImage]) -> anyhow::Result<f64> {
        let nearest = retrieve(pictures, &self.references)?;
        let own = (0..self.references.len()).filter(|index| is_held_out(*index));
        let right = nearest.iter().zip(own).filter(|(nearest, own)| **nearest == *own).count();
        Ok(right as f64 / pictures.len() as f64)
    }
}

/// How a student did.
struct HeldOutScores {
    error: f64,
    psnr: f64,
    pictures: Vec<RgbImage>,
}

fn draw(
    pipeline: &Pipeline,
    denoiser: &dyn Denoiser,
    evaluation: &EvaluationRun,
    output: &Output,
) -> anyhow::Result<Tensor> {
    let bar = output.progress("drawing", evaluation.prompts.len());
    let latents = evaluation.draw(pipeline, denoiser, &mut |count| bar.inc(count as u64))?;
    bar.finish_and_clear();
    Ok(latents)
}

/// The teacher's pictures noised to four levels, with fixed noise.
fn halfway_inputs(
    evaluation: &EvaluationRun,
    pipeline: &Pipeline,
    latents: &Tensor,
) -> anyhow::Result<Vec<DenoiserInput>> {
    let count = evaluation.prompts.len();
    let halfway = evaluation.halfway(pipeline, latents, count)?;
    let noise = ((&halfway.latents * 2.0)? - latents)?;
    let question = |level: f64| -> anyhow::Result<DenoiserInput> {
        let noised = ((latents * (1.0 - level))? + (&noise * level)?)?;
        let timestep = Tensor::full(level as f32, count, &Device::Cpu)?;
        Ok(DenoiserInput { latents: noised, timestep, ..halfway.clone() })
    };
    [0.125, 0.375, 0.625, 0.875].into_iter().map(question).collect()
}

/// Reference pictures at the size of those drawn; retrieval averages both over the same cells.
fn references() -> anyhow::Result<Vec<RgbImage>> {
    let sheet = image::load_from_memory(embedded::REFERENCES)?.to_rgb8();
    let tile = |index: u32| {
        let (column, row) = (index % TILES, index / TILES);
        let tile = image::imageops::crop_imm(&sheet, column * TILE, row * TILE, TILE, TILE).to_image();
        image::imageops::resize(&tile, 4 * TILE, 4 * TILE, image::imageops::FilterType::Nearest)
    };
    Ok((0..names().len() as u32).map(tile).collect())
}

fn model_name(radius: Radius, pool: Option<usize>) -> String {
    let pool = pool.map_or(String::new(), |pool| format!("-d{pool}"));
    format!("mini-flux-r{}{pool}", radius.tokens())
}

fn conversion(settings: &DemoSettings, base: &Path, model: &Path, samples: &Path) -> ConvertArgs {
    ConvertArgs {
        source: base.to_owned(),
        output: model.to_owned(),
        radius: 0.0,
        pool: None,
        attention: None,
        no_distill: false,
        dtype: None,
        link: false,
        overwrite: true,
        dry_run: false,
        reading: SourceArgs::default(),
        training: TrainingArgs { samples: Some(samples.to_owned()), ..training(settings, None) },
        adapters: WeightAdapterArgs::default(),
    }
}
