//! [`EvaluationRun`]: the same prompts and the same initial noise for several models, so that their images can be
//! compared.

use crate::args::SamplingArgs;
use anyhow::Context as _;
use candle_core::{DType, Tensor};
use clearform_models::{BatchSpec, Denoiser, DenoiserInput, GuidanceKind, ImageSize, Noised, Prompt, StepIndex};
use clearform_plugin_host::{ControlNetInput, ControlledDenoiser};
use clearform_runtime::{InitialLatents, Pipeline, RgbImage};
use clearform_sampling::denoise;
use std::path::Path;

/// Image tokens per batch: one image of 1024 x 1024 px in FLUX. Larger images are generated one by one, since memory
/// grows with the tokens of a batch.
const BATCH_TOKENS: usize = 4096;

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
    /// Input of the ControlNets, one image per prompt; empty if there are none.
    pub control_images: Vec<RgbImage>,
}

/// Prompts where the user gives none. A class-conditional model generates as many classes instead.
const DEFAULT_PROMPTS: [&str; 4] = ["a red apple", "a cat", "a lighthouse at dawn", "a bowl of soup"];

/// The prompts in the file at `path`, one per line. Without a file: those of `defaults`, or, for a class-conditional
/// model, up to `max_classes` classes, evenly spread.
///
/// # Errors
/// If the file cannot be read or is empty, or holds anything but class indices for a class-conditional model.
pub fn prompts_or_classes(
    pipeline: &Pipeline,
    path: Option<&Path>,
    defaults: &str,
    max_classes: usize,
) -> anyhow::Result<Vec<Prompt>> {
    // The class after the last one stands for "no class", so its index is the number of classes.
    let class_count = match pipeline.guidance_kind() {
        GuidanceKind::ClassifierFree { unconditional: Prompt::Class(count), .. } => Some(*count),
        _ => None,
    };
    match (path, class_count) {
        (Some(path), Some(_)) => read_prompts(path, parse_class),
        (Some(path), None) => read_prompts(path, |_, line| Ok(Prompt::Text(line.to_owned()))),
        (None, Some(count)) => {
            let generated = count.min(max_classes.max(1) as u32);
            Ok((0..generated).map(|index| Prompt::Class(index * count / generated)).collect())
        }
        (None, None) => Ok(defaults.lines().map(|prompt| Prompt::Text(prompt.to_owned())).collect()),
    }
}

/// The prompts in the file at `path`, one per line; empty lines are skipped.
fn read_prompts(path: &Path, parse: fn(&Path, &str) -> anyhow::Result<Prompt>) -> anyhow::Result<Vec<Prompt>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let prompts = lines.map(|line| parse(path, line)).collect::<anyhow::Result<Vec<_>>>()?;
    anyhow::ensure!(!prompts.is_empty(), "{}: expected prompts, one per line, found none", path.display());
    Ok(prompts)
}

fn parse_class(path: &Path, line: &str) -> anyhow::Result<Prompt> {
    let class = line.parse().map(Prompt::Class);
    class.with_context(|| format!("{}: expected class indices, one per line, found {line:?}", path.display()))
}

impl EvaluationRun {
    /// What the arguments ask for, with the defaults of `teacher`.
    ///
    /// # Errors
    /// As [`prompts_or_classes`].
    pub fn new(args: &SamplingArgs, teacher: &Pipeline) -> anyhow::Result<Self> {
        let defaults = teacher.transformer().identified().variant.defaults;
        let default_prompts = DEFAULT_PROMPTS.join("\n");
        Ok(Self {
            prompts: prompts_or_classes(teacher, args.prompts.as_deref(), &default_prompts, DEFAULT_PROMPTS.len())?,
            size: args.size.map_or(teacher.native_size(), |edge| ImageSize { height: edge, width: edge }),
            steps: args.steps.unwrap_or(defaults.steps),
            guidance: defaults.guidance,
            seed: args.seed,
            control_images: Vec::new(),
        })
    }

    /// The prompts as text.
    pub fn prompt_texts(&self) -> Vec<String> {
        self.prompts.iter().map(Prompt::to_string).collect()
    }

    /// Denoises an image for every prompt; `advance` is called with the number of images finished since the last call.
    ///
    /// # Shapes
    /// Returns latents, (prompts, ..) as the transformer takes them, in f32.
    ///
    /// # Errors
    /// If a prompt cannot be encoded, or the transformer fails.
    pub fn generate_latents(
        &self,
        pipeline: &Pipeline,
        denoiser: &dyn Denoiser,
        advance: &mut dyn FnMut(usize),
    ) -> anyhow::Result<Tensor> {
        let (encoded, unconditional) = pipeline.encode_guided(&self.prompts)?;
        let mut generated = Vec::new();
        let batch = (BATCH_TOKENS / self.initial_noise(pipeline, 0, 1)?.image_tokens).max(1);
        for start in (0..self.prompts.len()).step_by(batch) {
            let count = batch.min(self.prompts.len() - start);
            let noise = self.initial_noise(pipeline, start, count)?;
            let schedule = pipeline.schedule(self.steps, &noise)?;
            let guidance = pipeline.guidance_for(
                &encoded.samples(start, count)?,
                unconditional.as_ref(),
                &noise,
                self.guidance,
            )?;
            let controlled = ControlledDenoiser::new(denoiser, self.control_inputs(pipeline, start, count)?);
            let latents = denoise(&controlled, &noise.tensor, &schedule, &guidance, &mut |_| ())?;
            generated.push(latents.to_dtype(DType::F32)?);
            advance(count);
        }
        Ok(Tensor::cat(&generated, 0)?)
    }

    /// Decodes latents from [`Self::generate_latents`] to images.
    pub fn decode(&self, pipeline: &Pipeline, latents: &Tensor) -> anyhow::Result<Vec<RgbImage>> {
        Ok(pipeline.decode(latents, self.size)?)
    }

    /// The first `count` images' latents at noise level 0.5, with noise that generated none of them: one evaluation on
    /// which to compare models.
    pub fn halfway_input(&self, pipeline: &Pipeline, latents: &Tensor, count: usize) -> anyhow::Result<DenoiserInput> {
        let encoded = pipeline.encode(&self.prompts[..count])?;
        let noise = self.initial_noise(pipeline, self.prompts.len(), count)?;
        let conditions = pipeline.conditions(&encoded, &noise, self.guidance)?;
        let level = Tensor::full(0.5f32, count, noise.tensor.device())?;
        let generated = latents.narrow(0, 0, count)?;
        let Noised { latents, timestep, .. } = pipeline.noise_process().add_noise(&generated, &noise.tensor, &level)?;
        let latents = latents.to_dtype(noise.tensor.dtype())?;
        Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
    }

    /// Inputs of the pipeline's ControlNets for images `start..start + count`.
    fn control_inputs(&self, pipeline: &Pipeline, start: usize, count: usize) -> anyhow::Result<Vec<ControlNetInput>> {
        let images = self.control_images.get(start..start + count).unwrap_or_default();
        let batch_spec = BatchSpec { size: self.size, batch: count, guidance: self.guidance };
        let inputs = pipeline.controlnets().iter().map(|active| pipeline.controlnet_input(active, images, batch_spec));
        Ok(inputs.collect::<Result<_, _>>()?)
    }

    /// Noise of images `start..start + count`, each from its own seed, the same as that of `generate --seed`.
    fn initial_noise(&self, pipeline: &Pipeline, start: usize, count: usize) -> anyhow::Result<InitialLatents> {
        let noise_of = |index| pipeline.initial_latents(self.seed + index as u64, 1, self.size);
        let noise = (start..start + count).map(noise_of).collect::<Result<Vec<_>, _>>()?;
        let tensors: Vec<&Tensor> = noise.iter().map(|latents| &latents.tensor).collect();
        Ok(InitialLatents { tensor: Tensor::cat(&tensors, 0)?, ..noise[0].clone() })
    }
}

/// Relative error of each layer's attention output, student against teacher, over image and text rows.
pub fn attention_errors(
    teacher: &dyn Denoiser,
    student: &dyn Denoiser,
    input: &DenoiserInput,
) -> anyhow::Result<Vec<(String, f64)>> {
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
