//! [`Pipeline`]: an open model with everything that decides what it generates. `stages` computes with it, stage by stage,
//! and `generate` runs all stages.

use crate::adapters::{ActiveControlNet, Adapters, EditedTransformer};
use crate::gpu_limits::check_dtype;
use crate::held_weights::HeldWeights;
use crate::latent_spec::LatentSpec;
use crate::{ComponentFiles, Components, MemoryOptions, ReadOptions, Result, TransformerCheckpoint};
use candle_core::{DType, Device};
use clearform_attention::AttentionPlan;
use clearform_models::vae::{VaePrecision, VaeTiling};
use clearform_models::{GuidanceKind, ImageSize, NoiseProcess, Prompt};
use clearform_plugin_host::{AdapterReport, LowRankMode, PatchedSource, WeightEdits};
use clearform_portable_model::recorded_plan;
use clearform_sampling::Scheduler;
use clearform_weights::TensorSource;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a model is opened and run.
#[derive(Debug, Clone)]
pub struct PipelineOptions {
    /// How the transformer's checkpoint is read.
    pub reading: ReadOptions,
    /// A folder with the components that the model lacks.
    pub components: Option<PathBuf>,
    /// Components in files of their own, which take precedence over those of the model.
    pub component_files: ComponentFiles,
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
    /// Whether [`Pipeline::generate`] generates in the sizes of training where the family's pipeline does, and resizes
    /// (`use_resolution_binning` in diffusers).
    pub resolution_binning: bool,
    /// Whether and how the VAE decodes images in tiles.
    pub vae_tiling: VaeTiling,
    /// What the VAE's convolutions multiply.
    pub vae_precision: VaePrecision,
    /// How much memory may be taken.
    pub memory: MemoryOptions,
}

impl PipelineOptions {
    /// The model's own attention plan and dtype, on the CPU, without adapters.
    ///
    /// # Errors
    /// A built-in manifest is broken.
    pub fn default_options() -> Result<Self> {
        Ok(Self {
            reading: ReadOptions::default_options()?,
            components: None,
            component_files: ComponentFiles::default(),
            plan: None,
            dtype: None,
            device: Device::Cpu,
            guided_channels: None,
            adapters: Adapters::default(),
            resolution_binning: true,
            vae_tiling: VaeTiling::default(),
            vae_precision: VaePrecision::default(),
            memory: MemoryOptions::default(),
        })
    }
}

/// An open model folder. Components are loaded when their stage begins and released when it ends.
pub struct Pipeline {
    pub(crate) components: Components,
    pub(crate) transformer: Arc<TransformerCheckpoint>,
    pub(crate) scheduler: Scheduler,
    guidance_kind: GuidanceKind,
    pub(crate) latent_spec: LatentSpec,
    plan: AttentionPlan,
    pub(crate) options: PipelineOptions,
    pub(crate) edits: Arc<WeightEdits>,
    reports: Vec<AdapterReport>,
    controlnets: Vec<ActiveControlNet>,
    /// Weights that stay in memory; `None` releases each component after its stage.
    pub(crate) held: Option<HeldWeights>,
}

impl Pipeline {
    /// Opens `model` and reads its configs, but no weights.
    ///
    /// # Errors
    /// A component is missing (the message names the option that adds it) or damaged, or an adapter does not fit.
    pub fn open(model: &Path, options: PipelineOptions) -> Result<Self> {
        let recorded = recorded_plan(model)?;
        let components = Components::new(model, options.components.as_deref()).with_files(&options.component_files);
        let reading = options.reading.clone().recorded(model)?;
        let transformer = TransformerCheckpoint::open(&components.transformer_path(), &reading)?;
        let components = components.with_embedded(&transformer, &reading)?;
        components.require(transformer.identified().components())?;
        let components = components.with_checked_tensors(transformer.identified())?;
        let edited = options.adapters.apply_to(transformer, Some(&components), &options.reading.manifests)?;
        let plan = options.plan.clone().or(recorded);
        Self::of_opened(components, edited, PipelineOptions { plan, ..options })
    }

    /// The pipeline of a transformer that is open already, to which the adapters of `options` were applied. Without a
    /// plan in `options` its attention is full.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn of_opened(components: Components, edited: EditedTransformer, options: PipelineOptions) -> Result<Self> {
        let EditedTransformer { transformer, edits, reports } = edited;
        components.require(transformer.identified().components())?;
        if let Some(dtype) = options.dtype {
            check_dtype(&options.device, dtype)?;
        }
        let plan = options.plan.clone().unwrap_or_else(AttentionPlan::full);
        transformer.check_plan(&plan)?;
        let controlnets = options.adapters.open_controlnets(&transformer)?;
        controlnets.iter().try_for_each(ActiveControlNet::require_mode)?;
        let scheduler = scheduler(&components, &transformer)?;
        let guidance_kind = transformer.pipeline_spec().guidance_kind().with_channels(options.guided_channels);
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
            held: None,
        })
    }

    /// The components of the model.
    pub fn components(&self) -> &Components {
        &self.components
    }

    /// The tensors of each text encoder that it has, with the edits of adapters merged.
    ///
    /// # Errors
    /// A file is damaged.
    pub fn text_encoders(&self) -> Result<Vec<Box<dyn TensorSource>>> {
        let names = self.transformer.identified().all_components();
        let names = names.filter(|name| name.starts_with("text_encoder") && self.components.has(name));
        let edited = |name: &String| -> Result<Box<dyn TensorSource>> {
            let stored = self.components.weights(name)?;
            Ok(Box::new(PatchedSource::new(stored, self.edits.clone(), name, LowRankMode::Fused)))
        };
        names.map(edited).collect()
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

    /// The number of classes of a class-conditional model.
    pub fn class_count(&self) -> Option<u32> {
        // The label after the last one stands for no class.
        match self.guidance_kind {
            GuidanceKind::ClassifierFree { unconditional: Prompt::Class(count), .. } => Some(count),
            _ => None,
        }
    }

    /// The noise process that the model was trained for.
    pub fn noise_process(&self) -> NoiseProcess {
        self.transformer.pipeline_spec().noise_process()
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
    pub fn device(&self) -> &Device {
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

    /// Notes for the user: assumptions made when the model was opened, files that were ignored, and optional text encoders
    /// that are missing.
    pub fn notes(&self) -> Vec<String> {
        let identified = self.transformer.identified();
        let missing = self.components.missing(identified.optional_components());
        let missing = missing.into_iter().filter(|component| component.starts_with("text_encoder"));
        let without = |component: &str| format!("{component} is missing and not used; pass --components DIR to add it");
        let notes = identified.notes.iter().chain(self.transformer.checkpoint().notes());
        let of_components = self.components.notes().iter().chain(notes).cloned();
        of_components.chain(missing.map(without)).chain(self.unused_components_note()).collect()
    }

    /// What is said of the folder of further components if nothing is taken from it.
    pub fn unused_components_note(&self) -> Option<String> {
        self.components.unused_note(self.transformer.identified().all_components())
    }

    /// The dtype of the latents, and of the transformer if the options state one.
    pub(crate) fn dtype(&self) -> DType {
        self.options.dtype.unwrap_or_else(|| self.transformer.dtype(&self.options.device))
    }
}

/// The model's scheduler if it has one, else the one its family was published with.
fn scheduler(components: &Components, transformer: &TransformerCheckpoint) -> Result<Scheduler> {
    let spec = transformer.pipeline_spec();
    Ok(match components.scheduler(transformer.identified())? {
        None => Scheduler::default_for(spec.noise_process()),
        Some(scheduler) => scheduler.spaced(spec.spacing()),
    })
}
