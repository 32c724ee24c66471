//! [`Pipeline`]: from subjects to pictures as diffusers' pipelines go, in stages that can also be used one by one. What a
//! family does in its own way it asks the family.

use crate::adapters::{ActiveControlNet, Adapters, EditedTransformer};
use crate::control_concat::ControlConcat;
use crate::latent_spec::LatentSpec;
use crate::text::{PipelineTextEncoders, open_weights};
use crate::{Components, ReadOptions, Result, RuntimeError, Transformer, check_images, to_images};
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
    /// How the transformer's tensors are read.
    pub reading: ReadOptions,
    /// A folder with the parts that the model lacks.
    pub components: Option<PathBuf>,
    /// What each attention layer sees; as a portable model records it without it, and full where nothing is recorded.
    pub plan: Option<AttentionPlan>,
    /// Number format of the transformer and the latents; the stored one without it.
    pub dtype: Option<DType>,
    /// Where everything runs.
    pub device: Device,
    /// Channels that classifier-free guidance acts on, from the first; as the family's own code has it without it.
    pub guided_channels: Option<usize>,
    /// What acts on the model.
    pub adapters: Adapters,
}

/// What to draw, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// What to draw.
    pub prompt: Prompt,
    /// What to stay away from. Families that embed the guidance scale need a `true_cfg_scale` above 1 for it; the others
    /// stay away from nothing in particular without it.
    pub negative: Option<Prompt>,
    /// Extents; the model's own without it.
    pub size: Option<ImageSize>,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale: embedded where the model takes it, classifier-free in the other families.
    pub guidance: f64,
    /// Classifier-free guidance scale of families that embed the other.
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

/// Noise, as the transformer takes it.
#[derive(Debug, Clone)]
pub struct InitialLatents {
    /// Latents, packed where the transformer takes them so.
    pub tensor: Tensor,
    /// Where each token lies, (image tokens, 3), where the transformer asks.
    pub image_ids: Option<Tensor>,
    /// Extents of the pictures.
    pub size: ImageSize,
    /// Image tokens of each.
    pub image_tokens: usize,
}

/// A model folder that is open. Parts are loaded when their stage begins and released when it ends.
pub struct Pipeline {
    components: Components,
    transformer: Transformer,
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
    /// Opens `model` and reads its small files; no weights yet.
    ///
    /// # Errors
    /// A part is missing, which the error says how to give, or is not what it should be.
    pub fn open(model: &Path, options: PipelineOptions) -> Result<Self> {
        let recorded = recorded_plan(model)?;
        let plan = options.plan.clone().or(recorded).unwrap_or_else(AttentionPlan::full);
        let components = Components::new(model, options.components.as_deref());
        let reading = options.reading.clone().recorded(model)?;
        let transformer = Transformer::open(&components.transformer(), &reading)?;
        let components = components.with_embedded(&transformer, &reading)?;
        components.complete(transformer.identified().components())?;
        let adapters = &options.adapters;
        let edited = adapters.apply_to(transformer, Some(&components), &options.reading.manifests)?;
        let EditedTransformer { transformer, edits, reports } = edited;
        let controlnets = adapters.open_controlnets(&transformer)?;
        let scheduler = scheduler(&components, &transformer)?;
        let guidance_kind =
            transformer.family().guidance_kind(transformer.config())?.over_channels(options.guided_channels);
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
        self.latent_spec.takes_control()
    }

    /// How a guidance scale acts on this model.
    pub fn guidance_kind(&self) -> &GuidanceKind {
        &self.guidance_kind
    }

    /// How samples of it are noised.
    pub fn noise_process(&self) -> NoiseProcess {
        self.transformer.family().noise_process()
    }

    /// What became of each weight adapter's tensors.
    pub fn adapter_reports(&self) -> &[AdapterReport] {
        &self.reports
    }

    /// The branches that act beside the transformer.
    pub fn controlnets(&self) -> &[ActiveControlNet] {
        &self.controlnets
    }

    /// Where everything runs.
    pub(crate) fn device(&self) -> &Device {
        &self.options.device
    }

    /// What each attention layer sees when [`Self::generate`] draws.
    pub fn plan(&self) -> &AttentionPlan {
        &self.plan
    }

    /// Extents of the pictures that the model knows.
    pub fn native_size(&self) -> ImageSize {
        self.latent_spec.native_size()
    }

    /// Draws what is asked for, and checks that there are pictures.
    ///
    /// # Errors
    /// A setting that cannot be used, weights that cannot be had, or pictures that must not be saved.
    pub fn generate(&self, request: &GenerateRequest, watch: &mut dyn FnMut(&PipelineStage)) -> Result<Vec<RgbImage>> {
        let size = self.latent_spec.check_size(request.size.unwrap_or(self.native_size()))?;
        let latents = self.initial_latents(request.seed, request.batch, size)?;
        let schedule = self.schedule(request.steps, &latents)?;
        watch(&PipelineStage::Encoding);
        let guidance = self.guidance(request, &latents)?;
        watch(&PipelineStage::Loading);
        let (own, others) = self.split_control_images(&request.control_images)?;
        let own = own.map(|picture| self.own_control(picture, size, request.batch)).transpose()?;
        let controls = self.controls(others, BatchSpec { size, batch: request.batch, guidance: request.guidance })?;
        let transformer = self.load_transformer(&self.plan, self.options.dtype)?;
        let beside = ControlConcat { base: transformer.as_ref(), control: own };
        let denoiser = ControlledDenoiser::new(&beside, controls);
        let mut step = |progress: &StepProgress| watch(&PipelineStage::Step(progress));
        let drawn = denoise(&denoiser, &latents.tensor, &schedule, &guidance, &mut step)?;
        drop(transformer);
        watch(&PipelineStage::Decoding);
        let pictures = self.decode(&drawn, size)?;
        check_images(&pictures)?;
        Ok(pictures)
    }

    /// Encodes `subjects` in f32, loading what is needed for it one after another.
    ///
    /// # Shapes
    /// A row for each subject.
    ///
    /// # Errors
    /// A part is missing or damaged, or the model does not draw such subjects.
    pub fn encode(&self, prompts: &[Prompt]) -> Result<Conditions> {
        if prompts.is_empty() {
            return Err(RuntimeError::BadSetting("prompts: expected at least one, found none".to_owned()));
        }
        let encoders =
            PipelineTextEncoders { components: &self.components, edits: &self.edits, device: &self.options.device };
        Ok(self.transformer.family().encode(self.transformer.config(), prompts, &encoders)?)
    }

    /// Loads the transformer with another plan or number format than the options'.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load_transformer(&self, plan: &AttentionPlan, dtype: Option<DType>) -> Result<Box<dyn Denoiser>> {
        self.transformer.build(plan, dtype, &self.options.device)
    }

    /// The noise that diffusers draws for `generator=torch.Generator("cpu").manual_seed(seed)`: one `randn` of the whole
    /// batch, packed afterwards.
    ///
    /// # Errors
    /// Extents that the model cannot draw, or an empty batch.
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

    /// The noise levels for `latents`.
    ///
    /// # Errors
    /// No step at all, or a scheduler of another kind than the model needs.
    pub fn schedule(&self, steps: usize, latents: &InitialLatents) -> Result<Schedule> {
        Ok(self.scheduler.schedule(steps, latents.image_tokens)?.for_process(self.noise_process())?)
    }

    /// Makes encoded subjects ready for `latents`: each repeated for its share of the batch, with what the model is told
    /// of the picture itself.
    ///
    /// # Errors
    /// A batch that the subjects do not divide.
    pub fn conditions(&self, encoded: &Conditions, latents: &InitialLatents, guidance: f64) -> Result<Conditions> {
        let batch_spec = BatchSpec { size: latents.size, batch: latents.tensor.dim(0)?, guidance };
        Ok(Conditions { image_ids: latents.image_ids.clone(), ..self.add_size_conditions(encoded, batch_spec)? })
    }

    /// The same for pictures of which no latents are at hand: without the places of tokens.
    ///
    /// # Errors
    /// As [`Self::conditions`].
    pub fn add_size_conditions(&self, encoded: &Conditions, batch_spec: BatchSpec) -> Result<Conditions> {
        let repeated = |_, rows: &Option<Tensor>| rows.as_ref().map(|rows| repeat(rows, batch_spec.batch)).transpose();
        let conditions = encoded.map_samples(repeated)?;
        let (family, config) = (self.transformer.family(), self.transformer.config());
        Ok(family.add_size_conditions(config, conditions, batch_spec, &self.options.device)?)
    }

    /// What each step is conditioned on: the subjects `encoded`, and `without`, from which classifier-free guidance leads
    /// away, where the model is steered so.
    ///
    /// # Errors
    /// As [`Self::conditions`].
    pub fn guidance_for(
        &self,
        encoded: &Conditions,
        without: Option<&Conditions>,
        latents: &InitialLatents,
        guidance: f64,
    ) -> Result<Guidance> {
        let positive = self.conditions(encoded, latents, guidance)?;
        match (&self.guidance_kind, without) {
            (GuidanceKind::ClassifierFree { channels, .. }, Some(without)) if self.guidance_kind.guides(guidance) => {
                let negative = self.conditions(without, latents, guidance)?;
                Ok(Guidance::classifier_free(positive, negative, guidance, *channels)?)
            }
            _ => Ok(Guidance::Embedded(positive)),
        }
    }

    /// Encodes `subjects`, and with them what classifier-free guidance leads away from where nobody says what, if the
    /// model is steered so.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_guided(&self, prompts: &[Prompt]) -> Result<(Conditions, Option<Conditions>)> {
        let GuidanceKind::ClassifierFree { without, .. } = &self.guidance_kind else {
            return Ok((self.encode(prompts)?, None));
        };
        let all: Vec<Prompt> = prompts.iter().chain([without]).cloned().collect();
        let encoded = self.encode(&all)?;
        let count = prompts.len();
        Ok((encoded.samples(0, count)?, Some(encoded.samples(count, 1)?)))
    }

    /// Loads the VAE, where there is one, and decodes latents, one picture at a time: a picture's activations are the
    /// largest thing in memory here.
    ///
    /// # Shapes
    /// drawn as [`InitialLatents::tensor`].
    ///
    /// # Errors
    /// Latents that are not of this size, or pictures with NaN.
    pub fn decode(&self, drawn: &Tensor, size: ImageSize) -> Result<Vec<RgbImage>> {
        let [_, height, width] = self.latent_spec.latent_shape(size)?;
        let latents = self.transformer.family().unpack(drawn, height, width)?.to_dtype(DType::F32)?;
        let Some(vae) = self.load_vae()? else { return to_images(&latents) };
        let one = |index| vae.decode(&latents.narrow(0, index, 1)?);
        let decoded = (0..latents.dim(0)?).map(one).collect::<clearform_models::Result<Vec<_>>>()?;
        to_images(&Tensor::cat(&decoded, 0)?)
    }

    /// The VAE; none where the model draws pixels.
    pub(crate) fn load_vae(&self) -> Result<Option<AutoencoderKl>> {
        let Some(config) = self.latent_spec.vae() else { return Ok(None) };
        let weights = open_weights(&self.components, "vae", &self.edits, &self.options.device)?;
        Ok(Some(AutoencoderKl::build(config.clone(), weights.as_ref())?))
    }

    fn guidance(&self, request: &GenerateRequest, latents: &InitialLatents) -> Result<Guidance> {
        let GenerateRequest { prompt, negative, guidance, true_cfg_scale, .. } = request;
        self.check_guidance(*true_cfg_scale)?;
        let own = match &self.guidance_kind {
            GuidanceKind::ClassifierFree { without, .. } => Some(negative.as_ref().unwrap_or(without)),
            GuidanceKind::Embedded => negative.as_ref(),
        };
        let encoded = self.encode(&std::iter::once(prompt).chain(own).cloned().collect::<Vec<_>>())?;
        let (positive, negative) = (encoded.samples(0, 1)?, own.map(|_| encoded.samples(1, 1)).transpose()?);
        if let (GuidanceKind::Embedded, Some(negative)) = (&self.guidance_kind, &negative) {
            let ready = |encoded| self.conditions(encoded, latents, *guidance);
            return Ok(Guidance::new(ready(&positive)?, Some(ready(negative)?), *true_cfg_scale)?);
        }
        self.guidance_for(&positive, negative.as_ref(), latents, *guidance)
    }

    /// Refuses settings that would do nothing.
    fn check_guidance(&self, true_cfg_scale: f64) -> Result<()> {
        let reason = match &self.guidance_kind {
            GuidanceKind::Embedded if self.options.guided_channels.is_some() => {
                "guided channels: this model is not drawn with classifier-free guidance over some channels; leave it out"
            }
            GuidanceKind::ClassifierFree { .. } if true_cfg_scale != 1.0 => {
                "true_cfg_scale: this model has one guidance scale, which is classifier-free; give it as guidance"
            }
            _ => return Ok(()),
        };
        Err(RuntimeError::BadSetting(reason.to_owned()))
    }

    /// What was taken for granted when the model was opened, and what of its files was not read.
    pub fn notes(&self) -> Vec<String> {
        let identified = self.transformer.identified();
        let missing = self.components.missing(identified.optional_components());
        let missing = missing.into_iter().filter(|part| part.starts_with("text_encoder"));
        let absent = |part: &str| format!("{part} is not there; it is drawn without it (--components DIR gives one)");
        let taken = identified.notes.iter().chain(self.transformer.checkpoint().notes());
        taken.cloned().chain(missing.map(absent)).collect()
    }

    fn dtype(&self) -> DType {
        self.options.dtype.unwrap_or_else(|| self.transformer.dtype(&self.options.device))
    }
}

/// That of the model where there is one, and else what its family was published with.
fn scheduler(components: &Components, transformer: &Transformer) -> Result<Scheduler> {
    let identified = transformer.identified();
    let has_one =
        identified.components().iter().chain(identified.optional_components()).any(|part| part == "scheduler");
    if !has_one || components.folder("scheduler").is_err() {
        return Ok(Scheduler::default_for(transformer.family().noise_process()));
    }
    let scheduler = Scheduler::parse(&components.text("scheduler", "scheduler_config.json")?)?;
    Ok(scheduler.spaced(transformer.family().spacing()))
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
