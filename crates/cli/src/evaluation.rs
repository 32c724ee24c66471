//! [`EvaluationRun`]: the same prompts and the same noise for every model that is drawn with, so that pictures can be held
//! side by side.

use crate::args::SamplingArgs;
use anyhow::Context as _;
use candle_core::{DType, Tensor};
use clearform_models::{BatchSpec, Denoiser, DenoiserInput, GuidanceKind, ImageSize, Noised, Prompt, StepIndex};
use clearform_plugin_host::{ControlNetInput, ControlledDenoiser};
use clearform_runtime::{InitialLatents, Pipeline, RgbImage};
use clearform_sampling::denoise;
use std::path::Path;

/// Image tokens that are drawn at once; larger pictures are drawn one by one.
const TOKENS_AT_ONCE: usize = 4096;

/// What is drawn, and how.
#[derive(Debug, Clone)]
pub struct EvaluationRun {
    /// One picture each.
    pub prompts: Vec<Prompt>,
    /// Extents of every picture.
    pub size: ImageSize,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Seed of the first picture; each next has one more.
    pub seed: u64,
    /// What ControlNets are controlled by, a picture for each prompt; none where nothing is controlled.
    pub control_images: Vec<RgbImage>,
}

/// What is drawn where nobody says what, and how many classes.
const PROMPTS: [&str; 4] = ["a red apple", "a cat", "a lighthouse at dawn", "a bowl of soup"];

/// The subjects in the file at `path`, or those of `usual`, prompts one a line; in the place of the latter a model of
/// classes draws up to `most` of them, evenly spread.
pub fn prompts_or_classes(
    pipeline: &Pipeline,
    path: Option<&Path>,
    usual: &str,
    most: usize,
) -> anyhow::Result<Vec<Prompt>> {
    let of_classes = match pipeline.guidance_kind() {
        GuidanceKind::ClassifierFree { without: Prompt::Class(count), .. } => Some(*count),
        _ => None,
    };
    match (path, of_classes) {
        (Some(path), _) => read_prompts(path, of_classes.is_some()),
        (None, Some(count)) => {
            let drawn = count.min(most.max(1) as u32);
            Ok((0..drawn).map(|place| Prompt::Class(place * count / drawn)).collect())
        }
        (None, None) => Ok(usual.lines().map(|prompt| Prompt::Text(prompt.to_owned())).collect()),
    }
}

/// Subjects, one a line; empty lines are left out.
fn read_prompts(path: &Path, are_classes: bool) -> anyhow::Result<Vec<Prompt>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let prompt = |line: &str| match are_classes {
        true => line
            .parse()
            .map(Prompt::Class)
            .with_context(|| format!("{}: expected numbers of classes, one a line, found {line:?}", path.display())),
        false => Ok(Prompt::Text(line.to_owned())),
    };
    let prompts = lines.map(prompt).collect::<anyhow::Result<Vec<_>>>()?;
    anyhow::ensure!(!prompts.is_empty(), "{}: expected prompts, one a line, found none", path.display());
    Ok(prompts)
}

impl EvaluationRun {
    /// What `drawing` asks for, and the defaults of `teacher` where it asks for nothing.
    pub fn new(drawing: &SamplingArgs, teacher: &Pipeline) -> anyhow::Result<Self> {
        let defaults = teacher.transformer().identified().variant.defaults;
        Ok(Self {
            prompts: prompts_or_classes(teacher, drawing.prompts.as_deref(), &PROMPTS.join("\n"), PROMPTS.len())?,
            size: drawing.size.map_or(teacher.native_size(), |edge| ImageSize { height: edge, width: edge }),
            steps: drawing.steps.unwrap_or(defaults.steps),
            guidance: defaults.guidance,
            seed: drawing.seed,
            control_images: Vec::new(),
        })
    }

    /// The subjects, to be read.
    pub fn prompts(&self) -> Vec<String> {
        self.prompts.iter().map(Prompt::to_string).collect()
    }

    /// Draws every subject, and tells `advance` how many pictures were finished.
    ///
    /// # Shapes
    /// Returns latents, (subjects, ..) as the transformer takes them, in f32.
    pub fn draw(
        &self,
        pipeline: &Pipeline,
        denoiser: &dyn Denoiser,
        advance: &mut dyn FnMut(usize),
    ) -> anyhow::Result<Tensor> {
        let (encoded, without) = pipeline.encode_guided(&self.prompts)?;
        let mut drawn = Vec::new();
        let at_once = (TOKENS_AT_ONCE / self.noise(pipeline, 0, 1)?.image_tokens).max(1);
        for start in (0..self.prompts.len()).step_by(at_once) {
            let count = at_once.min(self.prompts.len() - start);
            let noise = self.noise(pipeline, start, count)?;
            let schedule = pipeline.schedule(self.steps, &noise)?;
            let guidance =
                pipeline.guidance_for(&encoded.samples(start, count)?, without.as_ref(), &noise, self.guidance)?;
            let controlled = ControlledDenoiser::new(denoiser, self.controls(pipeline, start, count)?);
            let latents = denoise(&controlled, &noise.tensor, &schedule, &guidance, &mut |_| ())?;
            drawn.push(latents.to_dtype(DType::F32)?);
            advance(count);
        }
        Ok(Tensor::cat(&drawn, 0)?)
    }

    /// Pictures of latents that [`Self::draw`] gave.
    pub fn decode(&self, pipeline: &Pipeline, latents: &Tensor) -> anyhow::Result<Vec<RgbImage>> {
        Ok(pipeline.decode(latents, self.size)?)
    }

    /// The first `count` pictures' latents, noised half way by noise of their own: one evaluation to compare models on.
    pub fn halfway(&self, pipeline: &Pipeline, latents: &Tensor, count: usize) -> anyhow::Result<DenoiserInput> {
        let encoded = pipeline.encode(&self.prompts[..count])?;
        let noise = self.noise(pipeline, self.prompts.len(), count)?;
        let conditions = pipeline.conditions(&encoded, &noise, self.guidance)?;
        let level = Tensor::full(0.5f32, count, noise.tensor.device())?;
        let drawn = latents.narrow(0, 0, count)?;
        let Noised { latents, timestep, .. } = pipeline.noise_process().noised(&drawn, &noise.tensor, &level)?;
        let latents = latents.to_dtype(noise.tensor.dtype())?;
        Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
    }

    /// What the branches of `pipeline` are controlled by for pictures `start..start + count`.
    fn controls(&self, pipeline: &Pipeline, start: usize, count: usize) -> anyhow::Result<Vec<ControlNetInput>> {
        let pictures = self.control_images.get(start..start + count).unwrap_or_default();
        let batch_spec = BatchSpec { size: self.size, batch: count, guidance: self.guidance };
        let one = |schedule| pipeline.control(schedule, pictures, batch_spec);
        Ok(pipeline.controlnets().iter().map(one).collect::<Result<_, _>>()?)
    }

    /// Noise of pictures `start..start + count`, each from its own seed, as `generate --seed` draws it.
    fn noise(&self, pipeline: &Pipeline, start: usize, count: usize) -> anyhow::Result<InitialLatents> {
        let one = |index| pipeline.initial_latents(self.seed + index as u64, 1, self.size);
        let noise = (start..start + count).map(one).collect::<Result<Vec<_>, _>>()?;
        let tensors: Vec<&Tensor> = noise.iter().map(|latents| &latents.tensor).collect();
        Ok(InitialLatents { tensor: Tensor::cat(&tensors, 0)?, ..noise[0].clone() })
    }
}

/// Relative error of each layer's attention output, student against teacher, text and image rows together.
pub fn attention_errors(
    teacher: &dyn Denoiser,
    student: &dyn Denoiser,
    input: &DenoiserInput,
) -> anyhow::Result<Vec<(String, f64)>> {
    let (mut wanted, mut got) = (teacher.embed(input)?, student.embed(input)?);
    let mut errors = Vec::new();
    for (index, layer) in teacher.layers().iter().enumerate() {
        wanted = teacher.block(index, wanted)?;
        got = student.block(index, got)?;
        let (Some(wanted), Some(got)) = (&wanted.attention, &got.attention) else { continue };
        let mut sums = (0.0, 0.0);
        for (wanted, got) in streams(wanted).into_iter().zip(streams(got)) {
            sums.0 += squares(&(got - wanted)?)?;
            sums.1 += squares(wanted)?;
        }
        errors.push((layer.clone(), (sums.0 / sums.1).sqrt()));
    }
    Ok(errors)
}

fn streams(attended: &clearform_attention::Attended) -> Vec<&Tensor> {
    std::iter::once(&attended.image).chain(&attended.text).collect()
}

fn squares(tensor: &Tensor) -> candle_core::Result<f64> {
    tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()
}
