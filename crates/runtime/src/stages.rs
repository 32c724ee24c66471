//! The stages of a pipeline, one by one: encoding prompts, initial noise, schedule, conditions and guidance, decoding.

use crate::components::VAE;
use crate::gpu_limits::check_decodable;
use crate::text::{PipelineTextEncoders, open_weights};
use crate::{BuildSpec, Pipeline, PipelineOptions, Result, RuntimeError, to_images};
use candle_core::{DType, Tensor};
use clearform_attention::AttentionPlan;
use clearform_models::text::TruncatedPrompt;
use clearform_models::vae::{Autoencoder, TileProgress};
use clearform_models::{BatchSpec, Conditions, Denoiser, GuidanceKind, ImageSize, Prompt};
use clearform_sampling::{Guidance, SamplingError, Schedule, TorchGenerator};
use clearform_weights::ProductPrecision;
use image::RgbImage;
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::sync::Arc;

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

/// Encoded prompts, and what classifier-free guidance extrapolates from.
#[derive(Debug, Clone)]
pub struct EncodedPrompts {
    /// A row for each prompt.
    pub positive: Conditions,
    /// One row: the negative or unconditional prompt; `None` where there is none.
    pub negative: Option<Conditions>,
    /// Prompts of which a text encoder reads only the beginning.
    pub truncated: Vec<TruncatedPrompt>,
}

/// Guidance scales.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuidanceScales {
    /// Guidance scale: embedded in families that take it as an input, classifier-free in the others.
    pub guidance: f64,
    /// Classifier-free guidance scale in families with an embedded one, as in diffusers' FluxPipeline; 1 is off.
    pub true_cfg: f64,
}

impl GuidanceScales {
    /// A guidance scale alone.
    pub fn new(guidance: f64) -> Self {
        Self { guidance, true_cfg: 1.0 }
    }
}

impl Pipeline {
    /// Encodes `prompts` in f32. Text encoders are loaded in sequence, each released before the next.
    ///
    /// # Shapes
    /// The conditions have a row for each prompt.
    ///
    /// # Errors
    /// A text encoder is missing or damaged, or the model does not take such prompts (text or classes).
    pub fn encode(&self, prompts: &[Prompt]) -> Result<Conditions> {
        Ok(self.encode_and_count(prompts)?.0)
    }

    /// As [`Self::encode`], with the prompts of which a text encoder reads only the beginning.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_and_count(&self, prompts: &[Prompt]) -> Result<(Conditions, Vec<TruncatedPrompt>)> {
        if prompts.is_empty() {
            return Err(RuntimeError::BadSetting("prompts: expected at least one, found none".to_owned()));
        }
        let encoders = PipelineTextEncoders {
            components: &self.components,
            edits: &self.edits,
            device: &self.options.device,
            memory: self.options.memory,
            held: self.held.as_ref().map(|held| &held.encoders),
            truncated: RefCell::default(),
        };
        let conditions = self.transformer.pipeline_spec().encode(prompts, &encoders)?;
        Ok((conditions, encoders.truncated.into_inner()))
    }

    /// Loads the transformer with `plan` and `dtype` instead of those of the options, for one image of its native size.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape, or the transformer does not fit into memory.
    pub fn load_transformer(&self, plan: &AttentionPlan, dtype: Option<DType>) -> Result<Box<dyn Denoiser>> {
        self.load_with(plan, BuildSpec { dtype, ..BuildSpec::default() })
    }

    /// The same with full attention, to draw samples from, which multiplies f32 activations in a precision.
    ///
    /// # Errors
    /// As [`Self::load_transformer`].
    pub fn load_teacher(&self, products: ProductPrecision) -> Result<Box<dyn Denoiser>> {
        self.load_with(&AttentionPlan::full(), BuildSpec { products, ..BuildSpec::default() })
    }

    fn load_with(&self, plan: &AttentionPlan, spec: BuildSpec) -> Result<Box<dyn Denoiser>> {
        let residency = self.transformer_residency(self.native_size(), 1)?;
        self.transformer.build_with(plan, &self.options.device, BuildSpec { residency, ..spec })
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
        let (tensor, image_ids) = self.transformer.pipeline_spec().pack(&noise)?;
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
        let spec = self.transformer.pipeline_spec();
        Ok(spec.add_size_conditions(conditions, batch_spec, &self.options.device)?)
    }

    /// Whether the transformer takes the guidance scale as an input.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn embeds_guidance(&self) -> Result<bool> {
        Ok(self.transformer.pipeline_spec().embeds_guidance()?)
    }

    /// Encodes `prompts`, and what guidance extrapolates from: `negative`, or in families with classifier-free guidance
    /// their unconditional prompt.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_prompts(&self, prompts: &[Prompt], negative: Option<&Prompt>) -> Result<EncodedPrompts> {
        let negative = match self.guidance_kind() {
            GuidanceKind::ClassifierFree { unconditional, .. } => Some(negative.unwrap_or(unconditional)),
            GuidanceKind::Embedded => negative,
        };
        let all: Vec<Prompt> = prompts.iter().chain(negative).cloned().collect();
        let (encoded, truncated) = self.encode_and_count(&all)?;
        let count = prompts.len();
        let negative = negative.map(|_| encoded.samples(count, 1)).transpose()?;
        Ok(EncodedPrompts { positive: encoded.samples(0, count)?, negative, truncated })
    }

    /// The guidance of every step. Every command chooses it here.
    ///
    /// # Errors
    /// As [`Self::conditions`], or a scale that is not finite or has no effect on this model.
    pub fn guidance(
        &self,
        prompts: &EncodedPrompts,
        latents: &InitialLatents,
        scales: GuidanceScales,
    ) -> Result<Guidance> {
        self.check_guidance(scales)?;
        let conditions = |encoded: &Conditions| self.conditions(encoded, latents, scales.guidance);
        let positive = conditions(&prompts.positive)?;
        let negative = prompts.negative.as_ref().map(conditions).transpose()?;
        Ok(match self.guidance_kind() {
            GuidanceKind::Embedded => Guidance::new(positive, negative, scales.true_cfg)?,
            GuidanceKind::ClassifierFree { channels, .. } => {
                Guidance::new(positive, negative, scales.guidance)?.with_channels(*channels)
            }
        })
    }

    /// Refuses settings that would have no effect.
    pub(crate) fn check_guidance(&self, scales: GuidanceScales) -> Result<()> {
        let reason = match self.guidance_kind() {
            GuidanceKind::Embedded if self.options.guided_channels.is_some() => {
                "guided channels: this model does not use classifier-free guidance by channels; remove the setting"
            }
            GuidanceKind::ClassifierFree { .. } if scales.true_cfg != 1.0 => {
                "true_cfg_scale: the guidance scale of this model is classifier-free already; set guidance instead"
            }
            _ => return Ok(()),
        };
        Err(RuntimeError::BadSetting(reason.to_owned()))
    }

    /// Whether families whose pipelines generate in the sizes of their training do so.
    pub fn bins_resolutions(&self) -> bool {
        self.options.resolution_binning
    }

    /// The size in which an image of `size` is generated before it is resized to `size`: with resolution binning, the
    /// size of training nearest in aspect ratio, for families whose pipelines do so.
    pub fn generated_size(&self, size: ImageSize) -> ImageSize {
        match self.bins_resolutions() {
            true => self.transformer.pipeline_spec().generated_size(size),
            false => size,
        }
    }

    /// Whether the model has a VAE; it generates pixels otherwise.
    pub fn has_vae(&self) -> bool {
        self.latent_spec.vae().is_some()
    }

    /// Whether an image of `size` is decoded in tiles.
    pub fn decodes_in_tiles(&self, size: ImageSize) -> bool {
        self.vae_tile(size).is_some()
    }

    /// Latent pixels along the side of the tiles in which the VAE reads or draws an image of `size`; `None` if whole.
    pub(crate) fn vae_tile(&self, size: ImageSize) -> Option<usize> {
        self.latent_spec.vae().and_then(|vae| self.options.vae_tiling.tile(vae, size))
    }

    /// Refuses images that cannot be decoded on the pipeline's device, before they are denoised.
    ///
    /// # Errors
    /// The VAE needs a tensor that a GPU cannot index. The message has the largest size that works.
    pub fn check_decodable(&self, size: ImageSize) -> Result<()> {
        self.latent_spec.vae().map_or(Ok(()), |vae| check_decodable(self.device(), vae, self.options.vae_tiling, size))
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
        to_images(&self.decode_values(latents, size, &mut |_| ControlFlow::Continue(()))?)
    }

    /// As [`Self::decode`], the values of the images, (batch, channels, height, width) from -1 to 1. `progress` is called
    /// after each tile, if there are any.
    ///
    /// # Errors
    /// As [`Self::decode`]; [`SamplingError::Cancelled`] if `progress` cancels.
    pub(crate) fn decode_values(
        &self,
        latents: &Tensor,
        size: ImageSize,
        progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
    ) -> Result<Tensor> {
        let [_, height, width] = self.latent_spec.latent_shape(size)?;
        let latents = self.transformer.pipeline_spec().unpack(latents, height, width)?.to_dtype(DType::F32)?;
        self.check_decodable(size)?;
        let Some(vae) = self.autoencoder()? else { return Ok(latents) };
        if let Some(tile) = self.vae_tile(size) {
            return vae.decode_in_tiles(&latents, tile, progress)?.ok_or_else(|| SamplingError::Cancelled.into());
        }
        let decode_image = |index| vae.decode(&latents.narrow(0, index, 1)?);
        let decoded = (0..latents.dim(0)?).map(decode_image).collect::<clearform_models::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&decoded, 0)?)
    }

    /// The transformer with the plan and dtype of the options, for `batch` images of `size`; from memory if the pipeline is
    /// loaded.
    pub(crate) fn own_transformer(&self, size: ImageSize, batch: usize) -> Result<Arc<dyn Denoiser>> {
        let load = || {
            let residency = self.transformer_residency(size, batch)?;
            let PipelineOptions { dtype, device, .. } = &self.options;
            let spec = BuildSpec { dtype: *dtype, residency, ..BuildSpec::default() };
            self.transformer.build_with(self.plan(), device, spec).map(Arc::from)
        };
        match &self.held {
            Some(held) => held.transformer.get_or_load(load),
            None => load(),
        }
    }

    /// The VAE, from memory if the pipeline is loaded; `None` if the model generates pixels.
    pub(crate) fn autoencoder(&self) -> Result<Option<Arc<dyn Autoencoder>>> {
        let Some(spec) = self.latent_spec.vae() else { return Ok(None) };
        let load = || {
            let weights = open_weights(&self.components, VAE, &self.edits, &self.options.device)?;
            let precision = self.options.vae_precision.on(&self.options.device);
            let built = spec.build(weights.as_ref(), precision);
            Ok(Arc::from(built.map_err(|error| self.components.located(VAE, error))?))
        };
        match &self.held {
            Some(held) => held.autoencoder.get_or_load(load).map(Some),
            None => load().map(Some),
        }
    }
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
