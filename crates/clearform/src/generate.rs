//! [`generate`]: images from a prompt or a class.

use crate::adapters::{
    AdapterOptions, ControlNetReport, LoraApplyMode, acts_within, load_control_images, note_reports,
};
use crate::guidance_effects::{GivenGuidance, GuidanceEffects};
use crate::observer::{Observer, Progress, Stage, note};
use crate::output_place::TemporaryFile;
use crate::prompt_notes::{foreign_syntax_notes, note_truncated, texts};
use crate::recipe::token_grid;
use crate::sources::{ExtraComponents, Opening, default_options, read_options};
use crate::window_gain::WindowGain;
use crate::{ClearformError, ComputeDevice, FloatDtype, Result, SourceOptions};
use candle_core::Device;
use clearform_attention::AttentionPlan;
use clearform_layout::SamplingDefaults;
use clearform_models::vae::{TilingMode, VaePrecision, VaeTiling};
use clearform_models::{ImageSize, Prompt};
use clearform_plugin_host::AdapterReport;
use clearform_portable_model::{PortableModel, recorded_plan};
use clearform_runtime::{
    ActiveControlNet, ComponentFiles, ControlNetSchedule, GenerateRequest, GenerationParameters, GuidanceScales,
    MemoryOptions, Pipeline, PipelineOptions, PipelineStage, Residency, RgbImage, image_file,
};
use clearform_sampling::StepAction;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// What [`generate`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateOptions {
    /// Portable model or diffusers folder.
    pub model: PathBuf,
    /// What the images show: a text, or a class for class-conditional models.
    pub prompt: Prompt,
    /// What they should not show; needs classifier-free guidance.
    #[serde(default)]
    pub negative_prompt: Option<String>,
    /// How the model is read.
    #[serde(default)]
    pub reading: SourceOptions,
    /// A diffusers folder with the components that the model lacks.
    #[serde(default)]
    pub components: Option<PathBuf>,
    /// Components in files of their own, which take precedence.
    #[serde(default)]
    pub component_files: ComponentFiles,
    /// Attention plan; `None` is the model's own.
    #[serde(default)]
    pub attention: Option<AttentionPlan>,
    /// Image width, in pixels; `None` is the model's native size.
    #[serde(default)]
    pub width: Option<usize>,
    /// Image height, in pixels; `None` is the model's native size.
    #[serde(default)]
    pub height: Option<usize>,
    /// Denoising steps (`num_inference_steps` in diffusers); `None` is the variant's.
    #[serde(default)]
    pub steps: Option<usize>,
    /// Guidance scale (`guidance_scale` in diffusers); `None` is the variant's.
    #[serde(default)]
    pub guidance: Option<f64>,
    /// Classifier-free guidance scale of families with an embedded one (`true_cfg_scale` in diffusers); 1 is off.
    #[serde(default = "no_guidance")]
    pub true_cfg_scale: f64,
    /// Applies classifier-free guidance to the first channels only.
    #[serde(default)]
    pub guided_channels: Option<usize>,
    /// Seed: the noise is that of `torch.Generator("cpu").manual_seed(seed)`.
    #[serde(default)]
    pub seed: u64,
    /// Whether a model whose pipeline generates in the sizes of its training does so, and resizes (PixArt;
    /// `use_resolution_binning` in diffusers).
    #[serde(default = "with_binning")]
    pub resolution_binning: bool,
    /// Whether and how images are decoded in tiles.
    #[serde(default)]
    pub vae_tiling: VaeTiling,
    /// What the VAE's convolutions multiply.
    #[serde(default)]
    pub vae_precision: VaePrecision,
    /// Number of images.
    #[serde(default = "one_image")]
    pub batch: usize,
    /// Adapters applied to the model.
    #[serde(default)]
    pub adapters: AdapterOptions,
    /// Control images: first that of the transformer itself if it takes one, then one per ControlNet, or one for all.
    #[serde(default)]
    pub control_images: Vec<PathBuf>,
    /// Mask for ControlNets for inpainting: white is painted anew, black is kept as in the control image.
    #[serde(default)]
    pub control_mask: Option<PathBuf>,
    /// Where the model runs.
    #[serde(default)]
    pub device: ComputeDevice,
    /// Dtype to compute in; `None` is the file's.
    #[serde(default)]
    pub dtype: Option<FloatDtype>,
    /// How much memory may be taken.
    #[serde(default)]
    pub memory: MemoryOptions,
}

fn no_guidance() -> f64 {
    1.0
}

fn with_binning() -> bool {
    true
}

fn one_image() -> usize {
    1
}

impl GenerateOptions {
    /// One image of `prompt` by `model`, with the model's defaults.
    pub fn new(model: impl Into<PathBuf>, prompt: Prompt) -> Self {
        Self {
            model: model.into(),
            prompt,
            negative_prompt: None,
            reading: SourceOptions::default(),
            components: None,
            component_files: ComponentFiles::default(),
            attention: None,
            width: None,
            height: None,
            steps: None,
            guidance: None,
            true_cfg_scale: no_guidance(),
            guided_channels: None,
            seed: 0,
            resolution_binning: with_binning(),
            vae_tiling: VaeTiling::default(),
            vae_precision: VaePrecision::default(),
            batch: one_image(),
            adapters: AdapterOptions::default(),
            control_images: Vec::new(),
            control_mask: None,
            device: ComputeDevice::default(),
            dtype: None,
            memory: MemoryOptions::default(),
        }
    }

    fn pipeline_options(&self) -> Result<PipelineOptions> {
        let components = ExtraComponents { folder: self.components.as_deref(), files: &self.component_files };
        Ok(PipelineOptions {
            plan: self.attention.clone(),
            dtype: self.dtype.map(Into::into),
            reading: read_options(&self.reading)?,
            guided_channels: self.guided_channels,
            vae_tiling: self.vae_tiling,
            vae_precision: self.vae_precision,
            resolution_binning: self.resolution_binning,
            adapters: self.adapters.open()?,
            ..default_options(Opening { components, device: self.device, memory: self.memory })?
        })
    }

    fn request(&self, pipeline: &Pipeline) -> Result<GenerateRequest> {
        if self.negative_prompt.is_some() && pipeline.class_count().is_some() {
            let reason = "--negative-prompt: this model is class-conditional and takes no text; leave it out";
            return Err(ClearformError::bad_option(reason));
        }
        let native = pipeline.native_size();
        let SamplingDefaults { steps, guidance, .. } = pipeline.transformer().identified().variant.defaults;
        let height = self.height.unwrap_or(native.height);
        let width = self.width.unwrap_or(native.width);
        Ok(GenerateRequest {
            prompt: self.prompt.clone(),
            negative: self.negative_prompt.clone().map(Prompt::Text),
            size: Some(ImageSize { height, width }),
            steps: self.steps.unwrap_or(steps),
            guidance: self.guidance.unwrap_or(guidance),
            true_cfg_scale: self.true_cfg_scale,
            seed: self.seed,
            batch: self.batch,
            control_images: load_control_images("--control-image", &self.control_images)?,
            control_mask: load_control_images("--control-mask", self.control_mask.as_slice())?.pop(),
        })
    }
}

impl GenerateOptions {
    fn guidance_effects(&self, request: &GenerateRequest, pipeline: &Pipeline) -> Result<GuidanceEffects> {
        let given = GivenGuidance {
            scale: self.guidance.is_some(),
            negative_prompt: self.negative_prompt.is_some(),
            channels: self.guided_channels.is_some(),
        };
        let scales = GuidanceScales { guidance: request.guidance, true_cfg: request.true_cfg_scale };
        Ok(GuidanceEffects::of(given, scales, pipeline.guidance_kind(), pipeline.embeds_guidance()?))
    }

    /// What the user may not expect of the other settings.
    fn notes(&self, request: &GenerateRequest, pipeline: &Pipeline) -> Result<Vec<String>> {
        let size = request.size.unwrap_or(pipeline.native_size());
        let paths = self.control_images.iter().chain(&self.control_mask);
        let images = paths.zip(request.control_images.iter().chain(&request.control_mask));
        let mut notes: Vec<String> = images.filter_map(|(path, image)| reshaped(path, image, size)).collect();
        notes.extend(self.other_plan(pipeline.plan(), pipeline, size)?);
        notes.extend(self.adapters.without_effect());
        let of_vae = [
            (self.vae_tiling.mode != TilingMode::default(), "--vae-tiling"),
            (self.vae_tiling.tile_size.is_some(), "--vae-tile-size"),
            (self.vae_precision != VaePrecision::default(), "--vae-precision"),
        ];
        if !pipeline.has_vae() {
            let given = of_vae.into_iter().filter(|(is_given, _)| *is_given);
            notes.extend(given.map(|(_, flag)| format!("{flag} has no effect: the model has no VAE")));
        } else if self.vae_tiling.tile_size.is_some() && !pipeline.decodes_in_tiles(size) {
            notes.push(
                "--vae-tile-size has no effect: the image is decoded whole; --vae-tiling on decodes it in tiles".into(),
            );
        }
        if pipeline.has_vae() && self.vae_precision != self.vae_precision.on(pipeline.device()) {
            notes.push("--vae-precision bf16 has no effect on this device: the VAE is computed in f32".to_owned());
        }
        notes.extend(pipeline.controlnets().iter().filter_map(|active| idle(active, request.steps)));
        let prompts = texts(std::slice::from_ref(&self.prompt)).into_iter().chain(self.negative_prompt.as_deref());
        notes.extend(prompts.flat_map(|prompt| foreign_syntax_notes(&[prompt])));
        Ok(notes)
    }

    /// Settings that may change the last bits of pixels and are not the defaults, as command-line options.
    pub fn computation(&self, device: &Device) -> String {
        let fused = self.adapters.apply_mode == LoraApplyMode::Immediately && !self.adapters.to_string().is_empty();
        let settings = [
            self.dtype.map(|dtype| format!("--dtype {dtype}")),
            Some(self.vae_precision.on(device))
                .filter(|precision| *precision != VaePrecision::default())
                .map(|precision| format!("--vae-precision {precision}")),
            fused.then(|| "--lora-apply-mode immediately".to_owned()),
        ];
        settings.into_iter().flatten().collect::<Vec<_>>().join(" ")
    }

    /// A student draws well with the attention that it was distilled for.
    fn other_plan(&self, plan: &AttentionPlan, pipeline: &Pipeline, size: ImageSize) -> Result<Option<String>> {
        let own = match PortableModel::is_portable_model(&self.model) {
            true => PortableModel::open(&self.model)?.record().distilled_for(),
            false => recorded_plan(&self.model)?.map(|plan| plan.to_string()),
        };
        let own = own.unwrap_or_else(|| AttentionPlan::full().to_string());
        let transformer = pipeline.transformer();
        let grid = token_grid(transformer, Some(pipeline), size)?;
        let gain = WindowGain::new(transformer.identified(), plan, grid, size.height * size.width, 0);
        Ok((plan.to_string() != own).then(|| match (*plan == AttentionPlan::full(), gain.covers_all()) {
            (true, _) => format!("the model's weights are those for attention {own}, not those of the original"),
            (false, true) => {
                format!("{plan} covers the whole image; the model's weights are those for attention {own}")
            }
            (false, false) => format!(
                "the model's weights are those for attention {own}; it was not distilled for {plan}, so its images are \
                 worse"
            ),
        }))
    }
}

/// What is said of a ControlNet that acts in none of the steps.
fn idle(active: &ActiveControlNet, steps: usize) -> Option<String> {
    let ControlNetSchedule { interval: [start, end], .. } = active.schedule;
    (!acts_within([start, end], steps) || active.scale == 0.0).then(|| {
        format!(
            "{}: has no effect: with strength {}, start={start} and end={end} it acts in none of {steps} steps",
            active.controlnet.path().display(),
            active.scale
        )
    })
}

/// What is said of a control image of another shape.
fn reshaped(path: &Path, image: &RgbImage, size: ImageSize) -> Option<String> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let is_like = (width * size.height).abs_diff(height * size.width) <= size.height.max(size.width);
    (!is_like).then(|| {
        format!(
            "{}: {width} x {height} px, but the image has {} x {}; it is resized, which changes its shape",
            path.display(),
            size.width,
            size.height
        )
    })
}

/// Images, with what their files record about them.
#[derive(Debug)]
pub struct GeneratedImages {
    /// The images.
    pub images: Vec<RgbImage>,
    /// The parameters of each, with which it can be generated again.
    pub parameters: Vec<GenerationParameters>,
    /// The attention plan that they were generated with.
    pub attention: String,
    /// How many tensors of each weight adapter were applied.
    pub adapters: Vec<AdapterReport>,
    /// The ControlNets.
    pub controlnets: Vec<ControlNetReport>,
}

impl GeneratedImages {
    /// Writes each image with its parameters, as PNG, JPEG or WebP by the name.
    ///
    /// # Errors
    /// A file cannot be written or has another extension, or there are not as many paths as images.
    pub fn save(&self, paths: &[PathBuf]) -> Result<()> {
        if paths.len() != self.images.len() {
            let reason = format!("expected a path for each of {} images, found {}", self.images.len(), paths.len());
            return Err(ClearformError::BadOption(reason));
        }
        for (path, (image, parameters)) in paths.iter().zip(self.images.iter().zip(&self.parameters)) {
            image_file::save(path, image, parameters)?;
        }
        Ok(())
    }

    /// As [`Self::save`], but replaces nothing: where a file has appeared, `rename` gives another name. Returns the names.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn save_new(&self, paths: &[PathBuf], mut rename: impl FnMut() -> Result<PathBuf>) -> Result<Vec<PathBuf>> {
        let mut names = paths.to_vec();
        for (name, (image, parameters)) in names.iter_mut().zip(self.images.iter().zip(&self.parameters)) {
            let temporary = TemporaryFile::beside(name);
            temporary.write(|path| image_file::save(path, image, parameters))?;
            while let Err(error) = temporary.rename_new(name) {
                if error.kind() != ErrorKind::AlreadyExists {
                    return Err(error.into());
                }
                *name = rename()?;
            }
        }
        Ok(names)
    }
}

/// Generates images and checks that they are not empty. Text encoders, transformer and VAE are loaded in sequence, and each
/// is released before the next.
///
/// # Errors
/// The model or an adapter cannot be opened, a setting does not fit the model, or an image has NaN or a single colour;
/// [`ClearformError::Cancelled`].
///
/// # Example
/// ```no_run
/// use clearform::{AdapterKind, AdapterOptions, AdapterSpec, GenerateOptions, Prompt, generate};
///
/// let style = AdapterSpec::new("style.safetensors", AdapterKind::Lora).with_strength(0.8);
/// let options = GenerateOptions {
///     width: Some(2048),
///     height: Some(2048),
///     adapters: AdapterOptions::new([style]),
///     ..GenerateOptions::new("FLUX.1-dev-clear", Prompt::Text("a lighthouse at dawn".to_owned()))
/// };
/// generate(&options, &mut ())?.save(&["out.png".into()])?;
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn generate(options: &GenerateOptions, observer: &mut dyn Observer) -> Result<GeneratedImages> {
    let pipeline = Pipeline::open(&options.model, options.pipeline_options()?)?;
    pipeline.notes().iter().for_each(|text| note(observer, text));
    note_reports(pipeline.adapter_reports(), pipeline.controlnets(), observer);
    let mut request = options.request(&pipeline)?;
    note_binning(&pipeline, &request, observer);
    let effects = options.guidance_effects(&request, &pipeline)?;
    request.negative = request.negative.filter(|_| effects.negative_prompt);
    for text in effects.notes.iter().chain(&options.notes(&request, &pipeline)?) {
        note(observer, text);
    }
    note_memory(&pipeline, &request, observer)?;
    let generated = pipeline.generate(&request, &mut |stage| watch(stage, observer));
    let images = generated.map_err(|error| ClearformError::from(error).or_damage(|| pipeline.damage()))?;
    let parameters = (0..images.len()).map(|index| parameters(options, &request, &effects, &pipeline, index)).collect();
    let attention = pipeline.plan().to_string();
    let controlnets = pipeline.controlnets().iter().map(ControlNetReport::from).collect();
    Ok(GeneratedImages { images, parameters, attention, adapters: pipeline.adapter_reports().to_vec(), controlnets })
}

/// Notes that images are generated in another size than was asked for.
fn note_binning(pipeline: &Pipeline, request: &GenerateRequest, observer: &mut dyn Observer) {
    let Some(size) = request.size else { return };
    let generated = pipeline.generated_size(size);
    if !pipeline.bins_resolutions() && pipeline.transformer().pipeline_spec().generated_size(size) == size {
        let text = "--no-resolution-binning has no effect: the image is generated in the size asked for in any case";
        note(observer, text);
    }
    if generated != size {
        note(
            observer,
            format_args!(
                "{} x {} is generated as {} x {}, the size of training nearest to it, and resized; \
                 --no-resolution-binning generates it as it is",
                size.width, size.height, generated.width, generated.height
            ),
        );
    }
}

/// Peak memory from which the plan is said: every machine has less than that to spare.
const PLANNED: u64 = 4 << 30;

/// Tells what the image takes, where that is much or blocks are streamed. What does not fit is refused here, before
/// anything is loaded.
fn note_memory(pipeline: &Pipeline, request: &GenerateRequest, observer: &mut dyn Observer) -> Result<()> {
    let size = pipeline.generated_size(request.size.unwrap_or(pipeline.native_size()));
    let plan = pipeline.memory_plan(size, request.batch)?;
    if plan.residency("transformer") == Residency::Streamed || plan.peak() > PLANNED {
        note(observer, plan);
    }
    Ok(())
}

/// Passes a stage on to `observer`.
fn watch(stage: &PipelineStage, observer: &mut dyn Observer) -> StepAction {
    let progress = match stage {
        PipelineStage::Encoding => Progress::new(Stage::Encoding, 0, 0),
        PipelineStage::Loading(truncated) => {
            note_truncated(truncated, truncated.len(), observer);
            Progress::new(Stage::Loading, 0, 0)
        }
        PipelineStage::Step(step) => Progress::new(Stage::Denoising, step.done, step.steps),
        PipelineStage::Decoding(tiles) => tiles.map_or(Progress::new(Stage::Decoding, 0, 0), |tiles| {
            Progress::new(Stage::Decoding, tiles.done, tiles.total)
        }),
    };
    match observer.progress(&progress) {
        ControlFlow::Continue(()) => StepAction::Continue,
        ControlFlow::Break(()) => StepAction::Cancel,
    }
}

fn parameters(
    options: &GenerateOptions,
    request: &GenerateRequest,
    effects: &GuidanceEffects,
    pipeline: &Pipeline,
    index: usize,
) -> GenerationParameters {
    GenerationParameters {
        prompt: request.prompt.to_string(),
        negative_prompt: request.negative.as_ref().map(ToString::to_string).unwrap_or_default(),
        seed: request.seed,
        steps: request.steps,
        guidance: effects.guidance,
        true_cfg_scale: effects.true_cfg_scale,
        size: request.size.unwrap_or(pipeline.native_size()),
        model: file_name(&options.model),
        attention: pipeline.plan().to_string(),
        adapters: options.adapters.acting_in(request.steps).with_effect(pipeline.adapter_reports()).to_string(),
        computation: options.computation(pipeline.device()),
        number: index + 1,
        batch: request.batch,
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
