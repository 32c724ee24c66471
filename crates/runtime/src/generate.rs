//! [`Pipeline::generate`]: all stages in a row. Each component is loaded when its stage begins and released when it ends,
//! unless the pipeline is a [`LoadedPipeline`](crate::LoadedPipeline).

use crate::images::resize_and_crop;
use crate::{
    ControlImages, GuidanceScales, ImageBatch, InitialLatents, Pipeline, Result, RuntimeError, check_images, to_images,
};
use clearform_models::text::TruncatedPrompt;
use clearform_models::vae::TileProgress;
use clearform_models::{ImageSize, Prompt};
use clearform_sampling::{SamplingError, Schedule, StepAction, StepProgress};
use image::RgbImage;
use std::ops::ControlFlow;

/// The arguments of [`Pipeline::generate`].
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// Prompt or class.
    pub prompt: Prompt,
    /// Negative prompt. In families with an embedded guidance scale it only acts with a `true_cfg_scale` above 1; the
    /// others use their unconditional prompt if it is `None`.
    pub negative: Option<Prompt>,
    /// Width and height; `None` is the model's native size.
    pub size: Option<ImageSize>,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale: embedded in families that take it as an input, classifier-free in the others.
    pub guidance: f64,
    /// Classifier-free guidance scale in families with an embedded one, as in diffusers' FluxPipeline; 1 is off.
    pub true_cfg_scale: f64,
    /// Seed of the noise of the whole batch.
    pub seed: u64,
    /// Number of images.
    pub batch: usize,
    /// Control images: first that of the transformer itself if it takes one, then those of the ControlNets in their order.
    /// A single image serves all ControlNets.
    pub control_images: Vec<RgbImage>,
    /// Mask for ControlNets for inpainting: white is painted anew, black is kept.
    pub control_mask: Option<RgbImage>,
}

/// The stage that [`Pipeline::generate`] is in.
#[derive(Debug)]
pub enum PipelineStage<'a> {
    /// Loading text encoders and encoding prompts.
    Encoding,
    /// Loading the transformer, the prompts are encoded; some may have been too long.
    Loading(&'a [TruncatedPrompt]),
    /// A denoising step is done.
    Step(&'a StepProgress<'a>),
    /// Loading the VAE and decoding; with how many tiles are decoded, of an image that is decoded in tiles.
    Decoding(Option<TileProgress>),
}

impl Pipeline {
    /// Generates images and checks that they are not empty. `hook` is called at the beginning of each stage and after each
    /// denoising step; it may always cancel, and replace the latents after a step.
    ///
    /// # Errors
    /// [`SamplingError::Cancelled`] if the hook cancels; a setting that the model cannot use, weights that cannot be read, or images with NaN or of a single colour.
    pub fn generate(
        &self,
        request: &GenerateRequest,
        hook: &mut dyn FnMut(&PipelineStage) -> StepAction,
    ) -> Result<Vec<RgbImage>> {
        self.check_class(&request.prompt)?;
        let (latents, schedule) = self.start(request)?;
        let generated = latents.size;
        let size = self.requested_size(request);
        self.check_mask(request.control_mask.as_ref())?;
        let images = self.control_images(&request.control_images)?;
        let controls = ControlImages { mask: request.control_mask.clone(), ..images };
        let scales = request.scales();
        self.check_guidance(scales)?;
        enter(hook, &PipelineStage::Encoding)?;
        let prompts = self.encode_prompts(std::slice::from_ref(&request.prompt), request.negative.as_ref())?;
        enter(hook, &PipelineStage::Loading(&prompts.truncated))?;
        let batch = self.prepare(ImageBatch { latents, prompts, schedule, scales, controls })?;
        let transformer = self.own_transformer(generated, request.batch)?;
        let denoised = batch.denoise(transformer.as_ref(), &mut |step| hook(&PipelineStage::Step(step)))?;
        drop(transformer);
        enter(hook, &PipelineStage::Decoding(None))?;
        let mut watch = |tiles| match hook(&PipelineStage::Decoding(Some(tiles))) {
            StepAction::Cancel => ControlFlow::Break(()),
            StepAction::Continue | StepAction::Replace(_) => ControlFlow::Continue(()),
        };
        let decoded = self.decode_values(&denoised, generated, &mut watch)?;
        let images = to_images(&resize_and_crop(&decoded, size)?)?;
        check_images(&images)?;
        Ok(images)
    }

    /// Refuses the label of no class, which the text of an image would call a class.
    fn check_class(&self, prompt: &Prompt) -> Result<()> {
        match (prompt, self.class_count()) {
            (Prompt::Class(class), Some(count)) if *class >= count => {
                Err(RuntimeError::BadSetting(format!("class: expected 0 to {}, found {class}", count - 1)))
            }
            _ => Ok(()),
        }
    }

    fn requested_size(&self, request: &GenerateRequest) -> ImageSize {
        request.size.unwrap_or(self.native_size())
    }

    /// Initial noise and schedule of `request`: what shows first whether its settings fit the model.
    fn start(&self, request: &GenerateRequest) -> Result<(InitialLatents, Schedule)> {
        let size = self.generated_size(self.requested_size(request));
        self.check_decodable(size)?;
        let latents = self.initial_latents(request.seed, request.batch, size)?;
        let schedule = self.schedule(request.steps, &latents)?;
        Ok((latents, schedule))
    }
}

impl GenerateRequest {
    fn scales(&self) -> GuidanceScales {
        GuidanceScales { guidance: self.guidance, true_cfg: self.true_cfg_scale }
    }
}

/// Announces `stage`.
fn enter(hook: &mut dyn FnMut(&PipelineStage) -> StepAction, stage: &PipelineStage) -> Result<()> {
    match hook(stage) {
        StepAction::Cancel => Err(SamplingError::Cancelled.into()),
        StepAction::Continue | StepAction::Replace(_) => Ok(()),
    }
}
