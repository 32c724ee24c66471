//! [`Pipeline`]: from prompts to images as in diffusers' pipelines, in stages that can also be called one by one. What
//! differs between architectures is up to the family.

use crate::adapters::{ActiveControlNet, Adapters, EditedTransformer};
use crate::control_concat::ControlConcat;
use crate::latent_spec::LatentSpec;
use crate::text::{PipelineTextEncoders, open_weights};
use crate::{Components, ReadOptions, Result, RuntimeError, TransformerCheckpoint, check_images, to_images};
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_models::vae::AutoencoderKl;
use clearform_models::{BatchSpec, Conditions, Denoiser, GuidanceKind, ImageSize, NoiseProcess, Prompt};
use clearform_plugin_host::{AdapterReport, ControlledDenoiser, WeightEdits};
use clearform_portable_model::recorded_plan;
use clearform_sampling::{Guidance, Schedule, Scheduler, StepProgress, TorchGenerator, denoise};
use image::RgbImage;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a model is opened and run.
#[derive(Debug, Clone)]
pub struct PipelineOptions {
    /// How the transformer's checkpoint is read.
    pub reading: ReadOptions,
    /// A folder with the components that the model lacks.
    pub components: Option<PathBuf>,
    /// The attention of each layer. `None` is what a portable model records, and full attention for other models.
    pub plan: Option<AttentionPlan>,
    /// Dtype of the transformer and the latents. `None` is that of [`TransformerCheckpoint::dtype`].
    pub dtype: Option<DType>,
    /// The device that everything runs on.
    pub device: Device,
    /// How many channels classifier-free guidance acts on, counted from the first. `None` is the family's default.
    pub guided_channels: Option<usize>,
    /// LoRAs and ControlNets.
    pub adapters: Adapters,
}

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
}

/// The stage that [`Pipeline::generate`] is in.
#[derive(Debug)]
pub enum PipelineStage<'a> {
    /// Loading text encoders and encoding prompts.
    Encoding,
    /// Loading the transformer.
    Loading,
    /// A denoising step is done.
    Step(&'a StepProgress<'a>),
    /// Loading the VAE and decoding.
    Decoding,
}

/// Noise in the form that the transformer takes.
#[derive(Debug, Clone)]
pub struct InitialLatents {
    /// (batch, image tokens, channels) for transformers with packed latents, else (batch, channels, height, width).
    pub tensor: Tensor,
    /// Position of each token, (image tokens, 3), for transformers that take it.
    pub image_ids: Option<Tensor>,
    /// Size of the images.
    pub size: ImageSize,
    /// Tokens of each image.
    pub image_tokens: usize,
}

/// An open model folder. Components are loaded when their stage begins and released when it ends.
pub struct Pipeline {
    components: Components,
    transformer: TransformerCheckpoint,
    scheduler: Scheduler,
    guidance_kind: GuidanceKind,
    latent_spec: LatentSpec,
    plan: AttentionPlan,
    options: PipelineOptions,
    edits: Arc<WeightEdits>,
    reports: Vec<AdapterReport>,
    controlnets: Vec<ActiveControlNet>,
}

impl Pipeline {
    /// Opens `model` and reads its configs, but no weights.
    ///
    /// # Errors
    /// A component is missing (the message names the option that adds it) or damaged, or an adapter does not fit.
    pub fn open(model: &Path, options: PipelineOptions) -> Result<Self> {
        let recorded = recorded_plan(model)?;
        let plan = options.plan.clone().or(recorded).unwrap_or_else(AttentionPlan::full);
        let components = Components::new(model, options.components.as_deref());
        let reading = options.reading.clone().recorded(model)?;
        let transformer = TransformerCheckpoint::open(&components.transformer_path(), &reading)?;
        let components = components.with_embedded(&transformer, &reading)?;
        components.require(transformer.identified().components())?;
        let adapters = &options.adapters;
        let edited = adapters.apply_to(transformer, Some(&components), &options.reading.manifests)?;
        let EditedTransformer { transformer, edits, reports } = edited;
        let controlnets = adapters.open_controlnets(&transformer)?;
        let scheduler = scheduler(&components, &transformer)?;
        let guidance_kind =
            transformer.family().guidance_kind(transformer.config())?.with_channels(options.guided_channels);
        let latent_spec = LatentSpec::new(&components, &transformer)?;
        Ok(Self {
            components,
            transformer,
            scheduler,
            guidance_kind,
            latent_spec,
            plan,
            options,
            edits,
            reports,
            controlnets,
        })
    }

    /// The components of the model.
    pub fn components(&self) -> &Components {
        &self.components
    }

    /// The transformer, which is not loaded.
    pub fn transformer(&self) -> &TransformerCheckpoint {
        &self.transformer
    }

    /// Whether the transformer itself takes a control image, apart from any ControlNets.
    pub fn takes_control(&self) -> bool {
        self.latent_spec.takes_control()
    }

    /// How a guidance scale acts on this model.
    pub fn guidance_kind(&self) -> &GuidanceKind {
        &self.guidance_kind
    }

    /// The noise process that the model was trained for.
    pub fn noise_process(&self) -> NoiseProcess {
        self.transformer.family().noise_process()
    }

    /// What became of each weight adapter's tensors.
    pub fn adapter_reports(&self) -> &[AdapterReport] {
        &self.reports
    }

    /// The ControlNets that act on the transformer.
    pub fn controlnets(&self) -> &[ActiveControlNet] {
        &self.controlnets
    }

    /// The device that everything runs on.
    pub(crate) fn device(&self) -> &Device {
        &self.options.device
    }

    /// The attention that [`Self::generate`] uses.
    pub fn plan(&self) -> &AttentionPlan {
        &self.plan
    }

    /// The image size that the model was trained on.
    pub fn native_size(&self) -> ImageSize {
        self.latent_spec.native_size()
    }

    /// Generates images and checks that they are not empty. `progress` is called at the beginning of each stage and after
    /// each denoising step.
    ///
    /// # Errors
    /// A setting that the model cannot use, weights that cannot be read, or images with NaN or of a single colour.
    pub fn generate(
        &self,
        request: &GenerateRequest,
        progress: &mut dyn FnMut(&PipelineStage),
    ) -> Result<Vec<RgbImage>> {
        let size = self.latent_spec.check_size(request.size.unwrap_or(self.native_size()))?;
        let batch_spec = BatchSpec { size, batch: request.batch, guidance: request.guidance };
        let latents = self.initial_latents(request.seed, request.batch, size)?;
        let schedule = self.schedule(request.steps, &latents)?;
        progress(&PipelineStage::Encoding);
        let guidance = self.guidance(request, &latents)?;
        progress(&PipelineStage::Loading);
        let (first, others) = self.split_control_images(&request.control_images)?;
        let control = first.map(|image| self.control_latents(image, size, request.batch)).transpose()?;
        let controlnet_inputs = self.controlnet_inputs(others, batch_spec)?;
        let transformer = self.load_transformer(&self.plan, self.options.dtype)?;
        let with_control = ControlConcat { base: transformer.as_ref(), control };
        let denoiser = ControlledDenoiser::new(&with_control, controlnet_inputs);
        let mut on_step = |step: &StepProgress| progress(&PipelineStage::Step(step));
        let denoised = denoise(&denoiser, &latents.tensor, &schedule, &guidance, &mut on_step)?;
        drop(transformer);
        progress(&PipelineStage::Decoding);
        let images = self.decode(&denoised, size)?;
        check_images(&images)?;
        Ok(images)
    }

    /// Encodes `prompts` in f32. Text encoders are loaded in sequence, each released before the next.
    ///
    /// # Shapes
    /// The conditions have a row for each prompt.
    ///
    /// # Errors
    /// A text encoder is missing or damaged, or the model does not take such prompts (text or classes).
    pub fn encode(&self, prompts: &[Prompt]) -> Result<Conditions> {
        if prompts.is_empty() {
            return Err(RuntimeError::BadSetting("prompts: expected at least one, found none".to_owned()));
        }
        let encoders =
            PipelineTextEncoders { components: &self.components, edits: &self.edits, device: &self.options.device };
        Ok(self.transformer.family().encode(self.transformer.config(), prompts, &encoders)?)
    }

    /// Loads the transformer with `plan` and `dtype` instead of those of the options.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape.
    pub fn load_transformer(&self, plan: &AttentionPlan, dtype: Option<DType>) -> Result<Box<dyn Denoiser>> {
        self.transformer.build(plan, dtype, &self.options.device)
    }

    /// The noise that diffusers generates with `generator=torch.Generator("cpu").manual_seed(seed)`: one `randn` for the
    /// whole batch, which is then packed.
    ///
    /// # Errors
    /// The model cannot generate this size, or the batch is empty.
    pub fn initial_latents(&self, seed: u64, batch: usize, size: ImageSize) -> Result<InitialLatents> {
        let [channels, height, width] = self.latent_spec.latent_shape(size)?;
        if batch == 0 {
            return Err(RuntimeError::BadSetting("batch: expected at least 1, found 0".to_owned()));
        }
        let noise = TorchGenerator::new(seed).randn((batch, channels, height, width))?;
        let noise = noise.to_device(&self.options.device)?.to_dtype(self.dtype())?;
        let (tensor, image_ids) = self.transformer.family().pack(&noise)?;
        Ok(InitialLatents { tensor, image_ids, size, image_tokens: self.latent_spec.image_tokens(size)? })
    }

    /// The noise levels of `steps` steps for `latents`.
    ///
    /// # Errors
    /// `steps` is 0, or the scheduler does not fit the model's noise process.
    pub fn schedule(&self, steps: usize, latents: &InitialLatents) -> Result<Schedule> {
        Ok(self.scheduler.schedule(steps, latents.image_tokens)?.for_process(self.noise_process())?)
    }

    /// The conditions of `latents`: encoded prompts, each repeated for its part of the batch, with token positions, sizes and
    /// guidance scale for models that take them.
    ///
    /// # Errors
    /// The batch is not a multiple of the number of prompts.
    pub fn conditions(&self, encoded: &Conditions, latents: &InitialLatents, guidance: f64) -> Result<Conditions> {
        let batch_spec = BatchSpec { size: latents.size, batch: latents.tensor.dim(0)?, guidance };
        Ok(Conditions { image_ids: latents.image_ids.clone(), ..self.add_size_conditions(encoded, batch_spec)? })
    }

    /// As [`Self::conditions`], without token positions, which come from latents.
    ///
    /// # Errors
    /// As [`Self::conditions`].
    pub fn add_size_conditions(&self, encoded: &Conditions, batch_spec: BatchSpec) -> Result<Conditions> {
        let repeated = |_, rows: &Option<Tensor>| rows.as_ref().map(|rows| repeat(rows, batch_spec.batch)).transpose();
        let conditions = encoded.map_samples(repeated)?;
        let config = self.transformer.config();
        let family = self.transformer.family();
        Ok(family.add_size_conditions(config, conditions, batch_spec, &self.options.device)?)
    }

    /// The guidance of every step: the prompts `encoded`, and for models with classifier-free guidance also the
    /// `unconditional` ones.
    ///
    /// # Errors
    /// As [`Self::conditions`].
    pub fn guidance_for(
        &self,
        encoded: &Conditions,
        unconditional: Option<&Conditions>,
        latents: &InitialLatents,
        guidance: f64,
    ) -> Result<Guidance> {
        let positive = self.conditions(encoded, latents, guidance)?;
        match (&self.guidance_kind, unconditional) {
            (GuidanceKind::ClassifierFree { channels, .. }, Some(unconditional))
                if self.guidance_kind.guides(guidance) =>
            {
                let negative = self.conditions(unconditional, latents, guidance)?;
                Ok(Guidance::classifier_free(positive, negative, guidance, *channels)?)
            }
            _ => Ok(Guidance::SingleEvaluation(positive)),
        }
    }

    /// Encodes `prompts`, and for models with classifier-free guidance also the family's unconditional prompt.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_guided(&self, prompts: &[Prompt]) -> Result<(Conditions, Option<Conditions>)> {
        let GuidanceKind::ClassifierFree { unconditional, .. } = &self.guidance_kind else {
            return Ok((self.encode(prompts)?, None));
        };
        let all: Vec<Prompt> = prompts.iter().chain([unconditional]).cloned().collect();
        let encoded = self.encode(&all)?;
        let count = prompts.len();
        Ok((encoded.samples(0, count)?, Some(encoded.samples(count, 1)?)))
    }

    /// Loads the VAE, if the model has one, and decodes latents. One image at a time, since the VAE's activations are what
    /// takes most memory here.
    ///
    /// # Shapes
    /// latents as [`InitialLatents::tensor`].
    ///
    /// # Errors
    /// The latents are not of this size, or an image contains NaN.
    pub fn decode(&self, latents: &Tensor, size: ImageSize) -> Result<Vec<RgbImage>> {
        let [_, height, width] = self.latent_spec.latent_shape(size)?;
        let latents = self.transformer.family().unpack(latents, height, width)?.to_dtype(DType::F32)?;
        let Some(vae) = self.load_vae()? else { return to_images(&latents) };
        let decode_image = |index| vae.decode(&latents.narrow(0, index, 1)?);
        let decoded = (0..latents.dim(0)?).map(decode_image).collect::<clearform_models::Result<Vec<_>>>()?;
        to_images(&Tensor::cat(&decoded, 0)?)
    }

    /// The VAE; `None` if the model generates pixels.
    pub(crate) fn load_vae(&self) -> Result<Option<AutoencoderKl>> {
        let Some(config) = self.latent_spec.vae() else { return Ok(None) };
        let weights = open_weights(&self.components, "vae", &self.edits, &self.options.device)?;
        Ok(Some(AutoencoderKl::build(config.clone(), weights.as_ref())?))
    }

    fn guidance(&self, request: &GenerateRequest, latents: &InitialLatents) -> Result<Guidance> {
        let GenerateRequest { prompt, negative, guidance, true_cfg_scale, .. } = request;
        self.check_guidance(*true_cfg_scale)?;
        let negative = match &self.guidance_kind {
            GuidanceKind::ClassifierFree { unconditional, .. } => Some(negative.as_ref().unwrap_or(unconditional)),
            GuidanceKind::Embedded => negative.as_ref(),
        };
        let encoded = self.encode(&std::iter::once(prompt).chain(negative).cloned().collect::<Vec<_>>())?;
        let positive = encoded.samples(0, 1)?;
        let negative = negative.map(|_| encoded.samples(1, 1)).transpose()?;
        if let (GuidanceKind::Embedded, Some(negative)) = (&self.guidance_kind, &negative) {
            let positive = self.conditions(&positive, latents, *guidance)?;
            let negative = self.conditions(negative, latents, *guidance)?;
            return Ok(Guidance::new(positive, Some(negative), *true_cfg_scale)?);
        }
        self.guidance_for(&positive, negative.as_ref(), latents, *guidance)
    }

    /// Refuses settings that would have no effect.
    fn check_guidance(&self, true_cfg_scale: f64) -> Result<()> {
        let reason = match &self.guidance_kind {
            GuidanceKind::Embedded if self.options.guided_channels.is_some() => {
                "guided channels: this model does not use classifier-free guidance by channels; remove the setting"
            }
            GuidanceKind::ClassifierFree { .. } if true_cfg_scale != 1.0 => {
                "true_cfg_scale: the guidance scale of this model is classifier-free already; set guidance instead"
            }
            _ => return Ok(()),
        };
        Err(RuntimeError::BadSetting(reason.to_owned()))
    }

    /// Notes for the user: assumptions made when the model was opened, files that were ignored, and optional text encoders
    /// that are missing.
    pub fn notes(&self) -> Vec<String> {
        let identified = self.transformer.identified();
        let missing = self.components.missing(identified.optional_components());
        let missing = missing.into_iter().filter(|component| component.starts_with("text_encoder"));
        let without = |component: &str| format!("{component} is missing and not used; pass --components DIR to add it");
        let notes = identified.notes.iter().chain(self.transformer.checkpoint().notes());
        notes.cloned().chain(missing.map(without)).collect()
    }

    fn dtype(&self) -> DType {
        self.options.dtype.unwrap_or_else(|| self.transformer.dtype(&self.options.device))
    }
}

/// The model's scheduler if it has one, else the one its family was published with.
fn scheduler(components: &Components, transformer: &TransformerCheckpoint) -> Result<Scheduler> {
    let identified = transformer.identified();
    let has_one = identified
        .components()
        .iter()
        .chain(identified.optional_components())
        .any(|component| component == "scheduler");
    if !has_one || components.folder("scheduler").is_err() {
        return Ok(Scheduler::default_for(transformer.family().noise_process()));
    }
    let scheduler = Scheduler::parse(&components.text("scheduler", "scheduler_config.json")?)?;
    Ok(scheduler.spaced(transformer.family().spacing()))
}

/// The rows of `tensor`, each repeated so that there are `batch`, as torch's `repeat_interleave` does.
pub(crate) fn repeat(tensor: &Tensor, batch: usize) -> Result<Tensor> {
    let rows = tensor.dim(0)?;
    if !batch.is_multiple_of(rows) {
        return Err(RuntimeError::BadSetting(format!(
            "batch: expected a multiple of {rows}, the number of prompts or control images, found {batch}"
        )));
    }
    let indices = (0..batch).map(|index| (index * rows / batch) as u32).collect::<Vec<_>>();
    Ok(tensor.index_select(&Tensor::new(indices, tensor.device())?, 0)?)
}
