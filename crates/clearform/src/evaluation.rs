//! [`EvaluationRun`]: the same prompts and the same initial noise for several models, so that their images can be
//! compared.

use crate::adapters::control_images_per_prompt;
use crate::observer::{Observer, Progress, Stage, note};
use crate::prompt_notes::{foreign_syntax_notes, note_truncated, texts};
use crate::sources::{ExtraComponents, read_text};
use crate::{ClearformError, Result};
use candle_core::{DType, Tensor};
use clearform_models::{BatchSpec, Denoiser, DenoiserInput, ImageSize, Noised, Prompt, StepIndex};
use clearform_runtime::{
    ComponentFiles, EncodedPrompts, GuidanceScales, ImageBatch, InitialLatents, MemoryOptions, Pipeline, RgbImage,
    with_control,
};
use clearform_sampling::StepAction;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Image tokens per batch: one image of 1024 x 1024 px in FLUX. Larger images are generated one by one, since memory
/// grows with the tokens of a batch.
const BATCH_TOKENS: usize = 4096;

/// What two models generate from the same noise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationOptions {
    /// A file of prompts, or class indices, one per line, with comments in lines that begin with `#`; `None` is a few
    /// built-in ones.
    pub prompts: Option<PathBuf>,
    /// A diffusers folder with the components that the models lack.
    pub components: Option<PathBuf>,
    /// Components in files of their own, which take precedence.
    pub component_files: ComponentFiles,
    /// Control images, for transformers and ControlNets that take one: one for each prompt, or one for all.
    pub control_images: Vec<PathBuf>,
    /// Width and height of the images, in pixels; `None` is the model's native size.
    pub size: Option<usize>,
    /// Denoising steps; `None` is the variant's.
    pub steps: Option<usize>,
    /// Seed of the first prompt; each following prompt's is one higher.
    pub seed: u64,
    /// How much memory may be taken.
    pub memory: MemoryOptions,
}

/// What is generated, and how.
#[derive(Debug, Clone)]
pub struct EvaluationRun {
    /// One image each.
    pub prompts: Vec<Prompt>,
    /// Size of every image.
    pub size: ImageSize,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Seed of the first image; each following one's is one higher.
    pub seed: u64,
    /// Control images, one per prompt, for all that take one; empty if there are none.
    pub control_images: Vec<RgbImage>,
}

/// Prompts where the user gives none. A class-conditional model generates as many classes instead.
const DEFAULT_PROMPTS: [&str; 4] = ["a red apple", "a cat", "a lighthouse at dawn", "a bowl of soup"];

/// The prompts in the file at `path`, one per line; lines that begin with `#` are comments. Without a file: those of
/// `defaults`, or, for a class-conditional model, up to `max_classes` classes, evenly spread.
///
/// # Errors
/// If the file cannot be read or is empty, or holds anything but class indices for a class-conditional model.
pub fn prompts_or_classes(
    pipeline: &Pipeline,
    path: Option<&Path>,
    defaults: &str,
    max_classes: usize,
) -> Result<Vec<Prompt>> {
    match (path, pipeline.class_count()) {
        (Some(path), Some(count)) => read_prompts(path, |line| parse_class(path, line, count)),
        (Some(path), None) => read_prompts(path, |line| Ok(Prompt::Text(line.to_owned()))),
        (None, Some(count)) => {
            let generated = count.min(max_classes.max(1) as u32);
            Ok((0..generated).map(|index| Prompt::Class(index * count / generated)).collect())
        }
        (None, None) => Ok(defaults.lines().map(|prompt| Prompt::Text(prompt.to_owned())).collect()),
    }
}

/// The prompts in the file at `path`, one per line; empty lines and comments are skipped.
fn read_prompts(path: &Path, parse: impl Fn(&str) -> Result<Prompt>) -> Result<Vec<Prompt>> {
    let text = read_text(path)?;
    // Editors on Windows begin files with a byte order mark.
    let lines = text
        .trim_start_matches('\u{feff}')
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let prompts = lines.map(parse).collect::<Result<Vec<_>>>()?;
    match prompts.is_empty() {
        false => Ok(prompts),
        true => {
            Err(ClearformError::bad_option(format!("{}: expected prompts, one per line, found none", path.display())))
        }
    }
}

fn parse_class(path: &Path, line: &str, count: u32) -> Result<Prompt> {
    let class = line.parse().ok().filter(|class| *class < count);
    class.map(Prompt::Class).ok_or_else(|| {
        let (path, last) = (path.display(), count - 1);
        ClearformError::bad_option(format!(
            "{path}: expected class indices of 0 to {last}, one per line, found {line:?}"
        ))
    })
}

impl EvaluationOptions {
    /// Where components come from that the models lack.
    pub(crate) fn extra_components(&self) -> ExtraComponents<'_> {
        ExtraComponents { folder: self.components.as_deref(), files: &self.component_files }
    }
}

impl EvaluationRun {
    /// What the options ask for, with the defaults of `teacher`.
    ///
    /// # Errors
    /// As [`prompts_or_classes`]; or control images that cannot be read, or of another number.
    pub fn new(options: &EvaluationOptions, teacher: &Pipeline) -> Result<Self> {
        let defaults = teacher.transformer().identified().variant.defaults;
        let default_prompts = DEFAULT_PROMPTS.join("\n");
        let prompts = prompts_or_classes(teacher, options.prompts.as_deref(), &default_prompts, DEFAULT_PROMPTS.len())?;
        let size = options.size.map_or(teacher.native_size(), |edge| ImageSize { height: edge, width: edge });
        teacher.check_decodable(size)?;
        Ok(Self {
            control_images: control_images_per_prompt(&options.control_images, prompts.len())?,
            prompts,
            size,
            steps: options.steps.unwrap_or(defaults.steps),
            guidance: defaults.guidance,
            seed: options.seed,
        })
    }

    /// Refuses control images if nothing takes them.
    ///
    /// # Errors
    /// There are some, and `are_taken` is false.
    pub fn check_control_images(&self, are_taken: bool) -> Result<()> {
        if are_taken || self.control_images.is_empty() {
            return Ok(());
        }
        Err(ClearformError::bad_option("--control-image: neither the models nor a ControlNet take one; leave it out"))
    }

    /// The prompts as text.
    pub fn prompt_texts(&self) -> Vec<String> {
        self.prompts.iter().map(Prompt::to_string).collect()
    }

    /// Encodes the prompts. What the text encoders cut is noted, and what other programs would not read as text.
    ///
    /// # Errors
    /// If a prompt cannot be encoded.
    pub fn encode(&self, pipeline: &Pipeline, observer: &mut dyn Observer) -> Result<EncodedPrompts> {
        let prompts = pipeline.encode_prompts(&self.prompts, None)?;
        note_truncated(&prompts.truncated, self.prompts.len(), observer);
        foreign_syntax_notes(&texts(&self.prompts)).iter().for_each(|text| note(observer, text));
        Ok(prompts)
    }

    /// Denoises an image for every prompt; `advance` is called with the number of images finished since the last call,
    /// after each denoising step, and may cancel.
    ///
    /// # Shapes
    /// Returns latents, (prompts, ..) as the transformer takes them, in f32.
    ///
    /// # Errors
    /// If the transformer fails; [`ClearformError::Cancelled`].
    pub fn generate_latents(
        &self,
        pipeline: &Pipeline,
        prompts: &EncodedPrompts,
        denoiser: &dyn Denoiser,
        advance: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Tensor> {
        let batch = (BATCH_TOKENS / self.initial_noise(pipeline, 0, 1)?.image_tokens).max(1);
        let mut generated = Vec::new();
        for start in (0..self.prompts.len()).step_by(batch) {
            let count = batch.min(self.prompts.len() - start);
            let batch = pipeline.prepare(self.batch(pipeline, prompts, start, count)?)?;
            let latents = batch.denoise(denoiser, &mut |_| step_action(advance(0)));
            let latents = latents.map_err(|error| ClearformError::from(error).or_damage(|| pipeline.damage()))?;
            generated.push(latents.to_dtype(DType::F32)?);
            if advance(count).is_break() {
                return Err(ClearformError::Cancelled);
            }
        }
        Ok(Tensor::cat(&generated, 0)?)
    }

    /// Encodes the prompts, and [generates](Self::generate_latents) latents with its progress passed to `observer`.
    ///
    /// # Errors
    /// As [`Self::encode`] and [`Self::generate_latents`].
    pub fn watched_latents(
        &self,
        pipeline: &Pipeline,
        denoiser: &dyn Denoiser,
        observer: &mut dyn Observer,
    ) -> Result<Tensor> {
        let prompts = self.encode(pipeline, observer)?;
        let mut done = 0;
        let mut advance = |count: usize| {
            done += count;
            observer.progress(&Progress::new(Stage::Comparing, done, self.prompts.len()))
        };
        self.generate_latents(pipeline, &prompts, denoiser, &mut advance)
    }

    /// Images `start..start + count` as one batch.
    fn batch(&self, pipeline: &Pipeline, prompts: &EncodedPrompts, start: usize, count: usize) -> Result<ImageBatch> {
        let latents = self.initial_noise(pipeline, start, count)?;
        let control_images = self.control_images.get(start..start + count).unwrap_or_default();
        Ok(ImageBatch {
            schedule: pipeline.schedule(self.steps, &latents)?,
            prompts: EncodedPrompts { positive: prompts.positive.samples(start, count)?, ..prompts.clone() },
            scales: GuidanceScales::new(self.guidance),
            controls: pipeline.shared_control_images(control_images),
            latents,
        })
    }

    /// Decodes latents from [`Self::generate_latents`] to images.
    pub fn decode(&self, pipeline: &Pipeline, latents: &Tensor) -> Result<Vec<RgbImage>> {
        Ok(pipeline.decode(latents, self.size)?)
    }

    /// The first `count` images' latents at noise level 0.5, with noise that generated none of them: one evaluation on
    /// which to compare models.
    pub fn halfway_input(&self, pipeline: &Pipeline, latents: &Tensor, count: usize) -> Result<DenoiserInput> {
        let encoded = pipeline.encode(&self.prompts[..count])?;
        let noise = self.initial_noise(pipeline, self.prompts.len(), count)?;
        let conditions = pipeline.conditions(&encoded, &noise, self.guidance)?;
        let level = Tensor::full(0.5f32, count, noise.tensor.device())?;
        let generated = latents.narrow(0, 0, count)?;
        let Noised { latents, timestep, .. } = pipeline.noise_process().add_noise(&generated, &noise.tensor, &level)?;
        let latents = self.with_control(pipeline, latents.to_dtype(noise.tensor.dtype())?)?;
        Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
    }

    /// `latents` of the first images with those of the control images, where the transformer takes one.
    fn with_control(&self, pipeline: &Pipeline, latents: Tensor) -> Result<Tensor> {
        let count = latents.dim(0)?;
        let images = self.control_images.get(..count).unwrap_or_default();
        let batch_spec = BatchSpec { size: self.size, batch: count, guidance: self.guidance };
        match pipeline.control_latents(&pipeline.shared_control_images(images), batch_spec)? {
            Some(control) => Ok(with_control(&latents, &control)?),
            None => Ok(latents),
        }
    }

    /// Noise of images `start..start + count`, each from its own seed, the same as that of `generate --seed`.
    fn initial_noise(&self, pipeline: &Pipeline, start: usize, count: usize) -> Result<InitialLatents> {
        let noise_of = |index| pipeline.initial_latents(self.seed + index as u64, 1, self.size);
        let noise = (start..start + count).map(noise_of).collect::<clearform_runtime::Result<Vec<_>>>()?;
        let tensors: Vec<&Tensor> = noise.iter().map(|latents| &latents.tensor).collect();
        Ok(InitialLatents { tensor: Tensor::cat(&tensors, 0)?, ..noise[0].clone() })
    }
}

/// What denoising does when a watcher says whether to go on.
pub(crate) fn step_action(flow: ControlFlow<()>) -> StepAction {
    if flow.is_break() { StepAction::Cancel } else { StepAction::Continue }
}

/// Relative error of each layer's attention output, student against teacher, over image and text rows.
pub fn attention_errors(
    teacher: &dyn Denoiser,
    student: &dyn Denoiser,
    input: &DenoiserInput,
) -> Result<Vec<(String, f64)>> {
    let mut wanted = teacher.embed(input)?;
    let mut got = student.embed(input)?;
    let mut errors = Vec::new();
    for (index, layer) in teacher.layer_names().iter().enumerate() {
        wanted = teacher.block(index, wanted)?;
        got = student.block(index, got)?;
        let (Some(wanted), Some(got)) = (&wanted.attention, &got.attention) else { continue };
        let mut difference = 0.0;
        let mut reference = 0.0;
        for (wanted, got) in streams(wanted).into_iter().zip(streams(got)) {
            difference += sum_of_squares(&(got - wanted)?)?;
            reference += sum_of_squares(wanted)?;
        }
        errors.push((layer.clone(), (difference / reference).sqrt()));
    }
    Ok(errors)
}

/// The image rows and, if there are any, the text rows.
fn streams(attended: &clearform_attention::Attended) -> Vec<&Tensor> {
    std::iter::once(&attended.image).chain(&attended.text).collect()
}

fn sum_of_squares(tensor: &Tensor) -> candle_core::Result<f64> {
    tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()
}
