//! [`Pipeline`]: from prompts to pictures as FluxPipeline goes, in stages that can also be used one by one.

use crate::adapters::{ActingBranch, Adapters, Edited};
use crate::beside::Beside;
use crate::text::{encode_prompts, open_weights};
use crate::{Components, Frame, Reading, Result, RuntimeError, Size, Transformer, check_pictures, to_pictures};
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_convert::recorded_plan;
use clearform_models::families::flux::FluxConfig;
use clearform_models::vae::{AutoencoderKl, VaeConfig};
use clearform_models::{Conditions, Denoiser};
use clearform_plugins::{AdapterReport, Changes, Controlled};
use clearform_sampling::{FlowMatchEuler, Guidance, Progress, Schedule, TorchGenerator, denoise};
use image::RgbImage;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a model is opened and run.
#[derive(Debug, Clone)]
pub struct Options {
    /// How the transformer's tensors are read.
    pub reading: Reading,
    /// A folder with the parts that the model lacks.
    pub components: Option<PathBuf>,
    /// What each attention layer sees; as a portable model records it without it, and full where nothing is recorded.
    pub plan: Option<AttentionPlan>,
    /// Number format of the transformer and the latents; the stored one without it.
    pub dtype: Option<DType>,
    /// Where everything runs.
    pub device: Device,
    /// What acts on the model.
    pub adapters: Adapters,
}

/// What to draw, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What to draw.
    pub prompt: String,
    /// What to stay away from; needs a `true_cfg_scale` above 1.
    pub negative_prompt: Option<String>,
    /// Extents; the model's own without it.
    pub size: Option<Size>,
    /// Denoising steps.
    pub steps: usize,
    /// Embedded guidance scale, for models that have it.
    pub guidance: f64,
    /// Classifier-free guidance scale.
    pub true_cfg_scale: f64,
    /// Seed of the noise of the whole batch.
    pub seed: u64,
    /// Pictures to draw.
    pub batch: usize,
    /// What the transformer itself is controlled by, if it is, and then the branches in their order; for several branches
    /// one picture serves all.
    pub control_images: Vec<RgbImage>,
}

/// What [`Pipeline::generate`] is doing.
#[derive(Debug)]
pub enum Stage<'a> {
    /// Loading text encoders and encoding prompts.
    Encoding,
    /// Loading the transformer.
    Loading,
    /// A denoising step is done.
    Step(&'a Progress<'a>),
    /// Loading the VAE and decoding.
    Decoding,
}

/// Noise, as the transformer takes it.
#[derive(Debug, Clone)]
pub struct Latents {
    /// Packed latents, (batch, image tokens, channels).
    pub tokens: Tensor,
    /// Where each token lies, (image tokens, 3).
    pub image_ids: Option<Tensor>,
}

/// A model folder that is open. Parts are loaded when their stage begins and released when it ends.
pub struct Pipeline {
    components: Components,
    transformer: Transformer,
    scheduler: FlowMatchEuler,
    flux: FluxConfig,
    vae: VaeConfig,
    own_size: Size,
    plan: AttentionPlan,
    options: Options,
    changes: Arc<Changes>,
    reports: Vec<AdapterReport>,
    branches: Vec<ActingBranch>,
}

impl Pipeline {
    /// Opens `model` and reads its small files; no weights yet.
    ///
    /// # Errors
    /// A part is missing, which the error says how to give, or is not what it should be.
    pub fn open(model: &Path, options: Options) -> Result<Self> {
        let recorded = recorded_plan(model)?;
        let plan = options.plan.clone().or(recorded).unwrap_or_else(AttentionPlan::full);
        let components = Components::new(model, options.components.as_deref());
        let transformer = Transformer::open(&components.transformer(), &options.reading)?;
        components.complete(transformer.identified().components())?;
        let adapters = &options.adapters;
        let edited = adapters.onto(transformer, Some(&components), &options.reading.manifests)?;
        let Edited { transformer, changes, reports } = edited;
        let branches = adapters.open_branches(&transformer)?;
        let scheduler = FlowMatchEuler::from_config(&components.json("scheduler", "scheduler_config.json")?)?;
        let flux = FluxConfig::new(transformer.config())?;
        let vae_config = components.json("vae", "config.json")?;
        let vae = VaeConfig::new(&vae_config)?;
        check_channels(&flux, &vae)?;
        let edge = vae_config["sample_size"].as_u64().map_or(128 * vae.downscale(), |edge| edge as usize);
        let own_size = Size { height: edge, width: edge };
        Ok(Self { components, transformer, scheduler, flux, vae, own_size, plan, options, changes, reports, branches })
    }

    /// The parts and where they lie.
    pub fn components(&self) -> &Components {
        &self.components
    }

    /// The transformer, not loaded.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// Whether the transformer itself looks at a control picture, beside any branches.
    pub fn takes_control(&self) -> bool {
        self.flux.in_channels == 2 * 4 * self.vae.latent_channels
    }

    /// What became of each weight adapter's tensors.
    pub fn adapter_reports(&self) -> &[AdapterReport] {
        &self.reports
    }

    /// The branches that act beside the transformer.
    pub fn branches(&self) -> &[ActingBranch] {
        &self.branches
    }

    /// The edits of the adapters.
    pub(crate) fn changes(&self) -> &Changes {
        &self.changes
    }

    /// The VAE's sizes.
    pub(crate) fn vae_config(&self) -> &VaeConfig {
        &self.vae
    }

    /// Where everything runs.
    pub(crate) fn device(&self) -> &Device {
        &self.options.device
    }

    /// What each attention layer sees when [`Self::generate`] draws.
    pub fn plan(&self) -> &AttentionPlan {
        &self.plan
    }

    /// The extents that the VAE was made for, which are those of the pictures the model knows.
    pub fn own_size(&self) -> Size {
        self.own_size
    }

    /// Draws what is asked for, and checks that there are pictures.
    ///
    /// # Errors
    /// A setting that cannot be used, weights that cannot be had, or pictures that must not be saved.
    pub fn generate(&self, request: &Request, watch: &mut dyn FnMut(&Stage)) -> Result<Vec<RgbImage>> {
        let size = self.check_size(request.size.unwrap_or(self.own_size))?;
        let latents = self.initial_latents(request.seed, request.batch, size)?;
        let schedule = self.schedule(request.steps, &latents)?;
        watch(&Stage::Encoding);
        let guidance = self.guidance(request, &latents)?;
        watch(&Stage::Loading);
        let (own, others) = self.split_control_images(&request.control_images)?;
        let own = own.map(|picture| self.own_control(picture, size, request.batch)).transpose()?;
        let controls = self.controls(others, Frame { size, batch: request.batch, guidance: request.guidance })?;
        let transformer = self.load_transformer(&self.plan, self.options.dtype)?;
        let beside = Beside { base: transformer.as_ref(), control: own };
        let denoiser = Controlled::new(&beside, controls);
        let mut step = |progress: &Progress| watch(&Stage::Step(progress));
        let tokens = denoise(&denoiser, &latents.tokens, &schedule, &guidance, &mut step)?;
        drop(transformer);
        watch(&Stage::Decoding);
        let pictures = self.decode(&tokens, size)?;
        check_pictures(&pictures)?;
        Ok(pictures)
    }

    /// Loads the text encoders one after another, and encodes `prompts` in f32.
    ///
    /// # Shapes
    /// text (prompts, text tokens, channels), pooled (prompts, channels), text_ids (text tokens, 3).
    ///
    /// # Errors
    /// A part is missing or damaged.
    pub fn encode_prompts(&self, prompts: &[String]) -> Result<Conditions> {
        encode_prompts(&self.components, prompts, &self.changes, &self.options.device)
    }

    /// Loads the transformer with another plan or number format than the options'.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load_transformer(&self, plan: &AttentionPlan, dtype: Option<DType>) -> Result<Box<dyn Denoiser>> {
        self.transformer.build(plan, dtype, &self.options.device)
    }

    /// The noise that FluxPipeline draws for `generator=torch.Generator("cpu").manual_seed(seed)`: one `randn` of the
    /// whole batch, packed afterwards.
    ///
    /// # Errors
    /// Extents that the model cannot draw, or an empty batch.
    pub fn initial_latents(&self, seed: u64, batch: usize, size: Size) -> Result<Latents> {
        let Size { height, width } = self.latent_size(size)?;
        if batch == 0 {
            return Err(RuntimeError::BadSetting("batch: expected at least 1, found 0".to_owned()));
        }
        let noise = TorchGenerator::new(seed).randn((batch, self.vae.latent_channels, height, width))?;
        let noise = noise.to_device(&self.options.device)?.to_dtype(self.dtype())?;
        let (tokens, image_ids) = self.transformer.family().pack(&noise)?;
        Ok(Latents { tokens, image_ids })
    }

    /// The noise levels for `latents`.
    ///
    /// # Errors
    /// No step at all.
    pub fn schedule(&self, steps: usize, latents: &Latents) -> Result<Schedule> {
        Ok(self.scheduler.schedule(steps, latents.tokens.dim(1)?)?)
    }

    /// Makes conditions of prompts ready for `latents`: each prompt repeated for its share of the batch, the tokens'
    /// places, and the guidance scale where the model embeds one.
    ///
    /// # Errors
    /// A batch that the prompts do not divide.
    pub fn conditions(&self, prompts: &Conditions, latents: &Latents, guidance: f64) -> Result<Conditions> {
        let batch = latents.tokens.dim(0)?;
        let repeated = |tensor: &Option<Tensor>| tensor.as_ref().map(|tensor| repeat(tensor, batch)).transpose();
        let scale = || Tensor::new(vec![guidance as f32; batch], &self.options.device);
        Ok(Conditions {
            text: repeated(&prompts.text)?,
            pooled: repeated(&prompts.pooled)?,
            guidance: self.flux.guidance.then(scale).transpose()?,
            image_ids: latents.image_ids.clone(),
            ..prompts.clone()
        })
    }

    /// Loads the VAE and decodes packed latents, one picture at a time: a picture's activations are the largest
    /// thing in memory here.
    ///
    /// # Shapes
    /// tokens (batch, image tokens, channels).
    ///
    /// # Errors
    /// Latents that are not of this size, or pictures with NaN.
    pub fn decode(&self, tokens: &Tensor, size: Size) -> Result<Vec<RgbImage>> {
        let Size { height, width } = self.latent_size(size)?;
        let latents = self.transformer.family().unpack(tokens, height, width)?.to_dtype(DType::F32)?;
        let weights = open_weights(&self.components, "vae", &self.changes, &self.options.device)?;
        let vae = AutoencoderKl::build(self.vae.clone(), weights.as_ref())?;
        let one = |index| vae.decode(&latents.narrow(0, index, 1)?);
        let decoded = (0..latents.dim(0)?).map(one).collect::<clearform_models::Result<Vec<_>>>()?;
        to_pictures(&Tensor::cat(&decoded, 0)?)
    }

    fn guidance(&self, request: &Request, latents: &Latents) -> Result<Guidance> {
        let prompts = std::iter::once(&request.prompt).chain(&request.negative_prompt).cloned().collect::<Vec<_>>();
        let encoded = self.encode_prompts(&prompts)?;
        let one = |index| self.conditions(&pick(&encoded, index)?, latents, request.guidance);
        let negative = request.negative_prompt.is_some().then(|| one(1)).transpose()?;
        Ok(Guidance::new(one(0)?, negative, request.true_cfg_scale)?)
    }

    fn dtype(&self) -> DType {
        self.options.dtype.unwrap_or_else(|| self.transformer.dtype())
    }

    fn latent_size(&self, size: Size) -> Result<Size> {
        let Size { height, width } = self.check_size(size)?;
        let downscale = self.vae.downscale();
        Ok(Size { height: height / downscale, width: width / downscale })
    }

    /// A token is two latent places across and down.
    fn check_size(&self, size: Size) -> Result<Size> {
        let multiple = 2 * self.vae.downscale();
        let fits = |extent: usize| (1..=LARGEST).contains(&extent) && extent.is_multiple_of(multiple);
        if fits(size.height) && fits(size.width) {
            return Ok(size);
        }
        let near = |extent: usize| extent.clamp(multiple, LARGEST / multiple * multiple).next_multiple_of(multiple);
        let Size { height, width } = size;
        Err(RuntimeError::BadSetting(format!(
            "size: expected multiples of {multiple} up to {LARGEST}, found width {width} and height {height}; try --width {} --height {}",
            near(width),
            near(height)
        )))
    }
}

/// More pixels along an edge than anyone can have meant.
const LARGEST: usize = 1 << 15;

/// A token is four latent places. Canny and depth models, also those that a LoRA makes, take as many of a control beside
/// them; models that take masks are not run here.
fn check_channels(flux: &FluxConfig, vae: &VaeConfig) -> Result<()> {
    let (takes, packed) = (flux.in_channels, 4 * vae.latent_channels);
    if takes == packed || takes == 2 * packed {
        return Ok(());
    }
    Err(RuntimeError::BadSetting(format!(
        "the transformer takes tokens of {takes} channels, but this VAE's latents make tokens of {packed}. Either the VAE \
         is another model's (give the right one with --components DIR), or the transformer draws from a mask too (fill), \
         which is not supported"
    )))
}

/// Each row as often as it takes to fill `batch`, equal rows together.
pub(crate) fn repeat(tensor: &Tensor, batch: usize) -> Result<Tensor> {
    let rows = tensor.dim(0)?;
    if !batch.is_multiple_of(rows) {
        return Err(RuntimeError::BadSetting(format!("{rows} prompts cannot share a batch of {batch} evenly")));
    }
    let indices = (0..batch).map(|index| (index * rows / batch) as u32).collect::<Vec<_>>();
    Ok(tensor.index_select(&Tensor::new(indices, tensor.device())?, 0)?)
}

fn pick(conditions: &Conditions, index: usize) -> Result<Conditions> {
    let row = |tensor: &Option<Tensor>| tensor.as_ref().map(|tensor| tensor.narrow(0, index, 1)).transpose();
    Ok(Conditions { text: row(&conditions.text)?, pooled: row(&conditions.pooled)?, ..conditions.clone() })
}
