//! [`Sitting`]: the same prompts and the same noise for every model that is drawn with, so that pictures can be held
//! side by side.

use crate::args::Drawing;
use anyhow::Context as _;
use candle_core::{DType, Tensor};
use clearform_models::{Conditions, Denoiser, DenoiserInput, Moment};
use clearform_plugins::{Control, Controlled};
use clearform_runtime::{Frame, Latents, Pipeline, RgbImage, Size};
use clearform_sampling::{Guidance, denoise};
use std::path::Path;

/// Image tokens that are drawn at once; larger pictures are drawn one by one.
const TOKENS_AT_ONCE: usize = 4096;

/// What is drawn, and how.
#[derive(Debug, Clone)]
pub struct Sitting {
    /// One picture each.
    pub prompts: Vec<String>,
    /// Extents of every picture.
    pub size: Size,
    /// Denoising steps.
    pub steps: usize,
    /// Embedded guidance scale, for models that have it.
    pub guidance: f64,
    /// Seed of the first picture; each next has one more.
    pub seed: u64,
    /// What ControlNets are controlled by, a picture for each prompt; none where nothing is controlled.
    pub control_images: Vec<RgbImage>,
}

/// What is drawn where nobody says what.
const PROMPTS: [&str; 4] = ["a red apple", "a cat", "a lighthouse at dawn", "a bowl of soup"];

/// Prompts, one a line; empty lines are left out.
pub fn read_prompts(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let prompts: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    anyhow::ensure!(!prompts.is_empty(), "{}: expected prompts, one a line, found none", path.display());
    Ok(prompts)
}

impl Sitting {
    /// What `drawing` asks for, and the defaults of `teacher` where it asks for nothing.
    pub fn new(drawing: &Drawing, teacher: &Pipeline) -> anyhow::Result<Self> {
        let defaults = teacher.transformer().identified().variant.defaults;
        let prompts = match &drawing.prompts {
            Some(path) => read_prompts(path)?,
            None => PROMPTS.map(str::to_owned).to_vec(),
        };
        Ok(Self {
            prompts,
            size: drawing.size.map_or(teacher.own_size(), |edge| Size { height: edge, width: edge }),
            steps: drawing.steps.unwrap_or(defaults.steps),
            guidance: defaults.guidance,
            seed: drawing.seed,
            control_images: Vec::new(),
        })
    }

    /// Draws every prompt, and tells `advance` how many pictures were finished.
    ///
    /// # Shapes
    /// Returns packed latents, (prompts, image tokens, channels), in f32.
    pub fn draw(
        &self,
        pipeline: &Pipeline,
        denoiser: &dyn Denoiser,
        advance: &mut dyn FnMut(usize),
    ) -> anyhow::Result<Tensor> {
        let text = pipeline.encode_prompts(&self.prompts)?;
        let mut drawn = Vec::new();
        let at_once = (TOKENS_AT_ONCE / self.noise(pipeline, 0, 1)?.tokens.dim(1)?).max(1);
        for start in (0..self.prompts.len()).step_by(at_once) {
            let count = at_once.min(self.prompts.len() - start);
            let noise = self.noise(pipeline, start, count)?;
            let conditions = pipeline.conditions(&rows(&text, start, count)?, &noise, self.guidance)?;
            let schedule = pipeline.schedule(self.steps, &noise)?;
            let guidance = Guidance::Embedded(conditions);
            let controlled = Controlled::new(denoiser, self.controls(pipeline, start, count)?);
            let latents = denoise(&controlled, &noise.tokens, &schedule, &guidance, &mut |_| ())?;
            drawn.push(latents.to_dtype(DType::F32)?);
            advance(count);
        }
        Ok(Tensor::cat(&drawn, 0)?)
    }

    /// Pictures of latents that [`Self::draw`] gave.
    pub fn develop(&self, pipeline: &Pipeline, latents: &Tensor) -> anyhow::Result<Vec<RgbImage>> {
        Ok(pipeline.decode(latents, self.size)?)
    }

    /// The first `count` pictures' latents, noised half way by noise of their own: one evaluation to compare models on.
    pub fn halfway(&self, pipeline: &Pipeline, latents: &Tensor, count: usize) -> anyhow::Result<DenoiserInput> {
        let text = pipeline.encode_prompts(&self.prompts[..count])?;
        let noise = self.noise(pipeline, self.prompts.len(), count)?;
        let conditions = pipeline.conditions(&text, &noise, self.guidance)?;
        let drawn = latents.narrow(0, 0, count)?.to_dtype(noise.tokens.dtype())?;
        let halfway = ((drawn + &noise.tokens)? * 0.5)?;
        let timestep = Tensor::full(0.5f32, count, halfway.device())?;
        Ok(DenoiserInput { latents: halfway, timestep, moment: Moment::default(), conditions })
    }

    /// What the branches of `pipeline` are controlled by for pictures `start..start + count`.
    fn controls(&self, pipeline: &Pipeline, start: usize, count: usize) -> anyhow::Result<Vec<Control>> {
        let pictures = self.control_images.get(start..start + count).unwrap_or_default();
        let frame = Frame { size: self.size, batch: count, guidance: self.guidance };
        let one = |acting| pipeline.control(acting, pictures, frame);
        Ok(pipeline.branches().iter().map(one).collect::<Result<_, _>>()?)
    }

    /// Noise of pictures `start..start + count`, each from its own seed, as `generate --seed` draws it.
    fn noise(&self, pipeline: &Pipeline, start: usize, count: usize) -> anyhow::Result<Latents> {
        let one = |index| pipeline.initial_latents(self.seed + index as u64, 1, self.size);
        let noise = (start..start + count).map(one).collect::<Result<Vec<_>, _>>()?;
        let tokens: Vec<&Tensor> = noise.iter().map(|latents| &latents.tokens).collect();
        Ok(Latents { tokens: Tensor::cat(&tokens, 0)?, image_ids: noise[0].image_ids.clone() })
    }
}

fn rows(conditions: &Conditions, start: usize, count: usize) -> candle_core::Result<Conditions> {
    let take = |tensor: &Option<Tensor>| tensor.as_ref().map(|tensor| tensor.narrow(0, start, count)).transpose();
    Ok(Conditions { text: take(&conditions.text)?, pooled: take(&conditions.pooled)?, ..conditions.clone() })
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
