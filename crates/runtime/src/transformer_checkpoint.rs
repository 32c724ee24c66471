//! [`TransformerCheckpoint`]: an identified and open checkpoint of a transformer that is not loaded yet. It knows nothing of the
//! other components of a pipeline.

use crate::files::{TRANSFORMER, read_json, transformer_path};
use crate::gpu_limits::{check_dtype, default_dtype};
use crate::weight_bytes::WeightBytes;
use crate::{Residency, Result, RuntimeError};
use candle_core::{DType, Device};
use clearform_attention::{AttentionPlan, learning_layer};
use clearform_layout::{CanonicalSource, Dequantized, Hints, Identified, LoadReport, Manifests, detect};
use clearform_models::{Architecture, Denoiser, FamilyRegistry, PipelineSpec, SeparateSamples, SharedPasses};
use clearform_plugin_host::{LowRankMode, PatchedSource, WeightEdits};
use clearform_portable_model::{ModelRecord, PortableModel};
use clearform_weights::{
    Checkpoint, ConvertedSource, Dtype, InMemoryTensors, ProductPrecision, SourceWithProducts, StreamedSource,
    TensorInfo, TensorSource, is_quantized,
};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// How a checkpoint is read.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// The rules of families and layouts.
    pub manifests: Manifests,
    /// What the user states about the checkpoint.
    pub hints: Hints,
    /// Accept tensors that have no counterpart in the model.
    pub allow_unmatched: bool,
    /// The families that can be run.
    pub families: FamilyRegistry,
    /// What is to be said of what was recorded and is not used.
    pub notes: Vec<String>,
}

/// A transformer on disk, with its tensors under canonical names.
pub struct TransformerCheckpoint {
    architecture: Box<dyn Architecture>,
    families: FamilyRegistry,
    identified: Identified,
    canonical: Arc<CanonicalSource<Dequantized<Arc<Checkpoint>>>>,
    edits: Arc<WeightEdits>,
    low_rank: LowRankMode,
}

impl ReadOptions {
    /// The built-in rules, and no hints.
    ///
    /// # Errors
    /// A built-in manifest is broken.
    pub fn default_options() -> Result<Self> {
        Ok(Self {
            manifests: Manifests::embedded()?,
            hints: Hints::default(),
            allow_unmatched: false,
            families: FamilyRegistry::default(),
            notes: Vec::new(),
        })
    }

    /// Adds the family and variant that a portable model at `path` records, where the hints do not state others. Does
    /// nothing for other models.
    ///
    /// # Errors
    /// The record cannot be read or states an unknown family, or a file does not have the recorded size.
    pub fn recorded(mut self, path: &Path) -> Result<Self> {
        if !PortableModel::is_portable_model(path) {
            return Ok(self);
        }
        let model = PortableModel::open(path)?;
        let ModelRecord { family, variant, .. } = model.record();
        let given_with = "if it was converted with --manifest FILE, give it again";
        let known = self.manifests.families();
        if self.hints.family.is_none() && !known.contains(family) {
            let reason = format!("the family {family:?} is unknown, expected one of {known:?}; {given_with}");
            return Err(RuntimeError::BadComponent { path: path.join(ModelRecord::FILE), reason });
        }
        self.hints.family.get_or_insert_with(|| family.clone());
        // "custom" is what no variant fits, so that there is nothing to hint at.
        if self.hints.variant.is_none() && self.manifests.has_variant(family, variant) {
            self.hints.variant = Some(variant.clone());
        } else if self.hints.variant.is_none() && variant != "custom" {
            let record = path.join(ModelRecord::FILE);
            self.notes
                .push(format!("{}: the variant {variant:?} is unknown and not used; {given_with}", record.display()));
        }
        Ok(self)
    }

    /// Options for `original`, which the portable model `model` was converted from and whose family, variant and sizes it
    /// shares. They are taken from the record of `model` if `original` has no config.json of its own.
    ///
    /// # Errors
    /// As [`Self::recorded`], or the config.json of `model` cannot be read.
    pub fn of_original(self, original: &Path, model: &Path) -> Result<Self> {
        if transformer_path(original).join("config.json").exists() || !PortableModel::is_portable_model(model) {
            return self.recorded(original);
        }
        let mut reading = self.recorded(model)?;
        let config = read_json(&model.join(TRANSFORMER).join("config.json"))?;
        reading.hints.config.get_or_insert(config);
        Ok(reading)
    }
}

impl TransformerCheckpoint {
    /// Opens the transformer at `path`, a folder or a file in any layout, and checks that it has exactly the tensors of a
    /// model of its family and sizes. No weights are read.
    ///
    /// # Errors
    /// A file is damaged, the family is not supported, or tensors are missing, have a wrong shape or are unknown.
    pub fn open(path: &Path, reading: &ReadOptions) -> Result<Self> {
        let bad_checkpoint = |source| RuntimeError::BadCheckpoint { path: path.to_owned(), source };
        let checkpoint = Dequantized::open(path, &reading.manifests)?;
        let mut identified = detect(&checkpoint, &reading.manifests, &reading.hints).map_err(bad_checkpoint)?;
        identified.notes.extend(reading.notes.iter().cloned());
        let families = reading.families;
        let architecture = architecture(path, &identified, families)?;
        let canonical = identified.canonical(checkpoint);
        let canonical =
            if reading.allow_unmatched { canonical.require_sufficient() } else { canonical.require_complete() };
        let canonical = canonical.map_err(bad_checkpoint)?;
        let unknown: Vec<&str> = canonical.load_report().unmatched().map(|(name, _)| name).collect();
        identified.notes.extend(unknown.first().map(|first| {
            format!(
                "{}: tensors that are not understood are left out: {first:?}, {} in all",
                path.display(),
                unknown.len()
            )
        }));
        Ok(Self {
            architecture,
            families,
            identified,
            canonical: Arc::new(canonical),
            edits: Arc::default(),
            low_rank: LowRankMode::default(),
        })
    }

    /// Adds the edits of adapters, which may add input channels.
    ///
    /// # Errors
    /// An edited tensor has a shape that no model of the family has.
    pub fn patched(mut self, edits: Arc<WeightEdits>, low_rank: LowRankMode, manifests: &Manifests) -> Result<Self> {
        self.edits = edits;
        self.low_rank = low_rank;
        if self.edits.affects(TRANSFORMER) {
            let resized = self.identified.resized(&self.source(), manifests)?;
            resized.canonical(self.source()).require_complete()?;
            // With unchanged sizes the identification stays, since the user may have stated the variant.
            if resized.config != self.identified.config {
                self.architecture = architecture(self.checkpoint().path(), &resized, self.families)?;
                self.identified = resized;
            }
        }
        Ok(self)
    }

    /// Its architecture, with the sizes of its config.json.
    pub fn architecture(&self) -> &dyn Architecture {
        self.architecture.as_ref()
    }

    /// What its pipeline does, as far as the family decides it.
    pub fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self.architecture.pipeline_spec()
    }

    /// What the checkpoint was identified as, with the defaults of its variant.
    pub fn identified(&self) -> &Identified {
        &self.identified
    }

    /// The config.json of its diffusers class.
    pub fn config(&self) -> &Value {
        &self.identified.config
    }

    /// Its files, which may hold other components too.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        self.canonical.source().source()
    }

    /// What became of each tensor in these files.
    pub fn load_report(&self) -> &LoadReport {
        self.canonical.load_report()
    }

    /// Its tensors under canonical names, with the edits of adapters applied.
    pub fn source(&self) -> impl TensorSource + use<> {
        self.edited(self.canonical.clone())
    }

    /// The same in `dtype`, to which a tensor is converted before it is edited; `None` is the stored one.
    pub fn source_in(&self, dtype: Option<DType>) -> impl TensorSource + use<> {
        self.edited(ConvertedSource::new(self.canonical.clone(), dtype))
    }

    fn edited<S: TensorSource>(&self, source: S) -> PatchedSource<S> {
        PatchedSource::new(source, self.edits.clone(), TRANSFORMER, self.low_rank)
    }

    /// The dtype of its largest tensor if `device` computes in it, bf16 if that is quantised, else [`default_dtype`]. CPUs
    /// do not compute in f16: there are no kernels for it, and some norms exceed its range.
    pub fn dtype(&self, device: &Device) -> DType {
        let tensors = self.canonical.tensors();
        let largest = tensors.iter().max_by_key(|info| info.shape.iter().product::<usize>());
        let stored = largest.and_then(|info| match is_quantized(&self.canonical, info) {
            true => Some(DType::BF16),
            false => DType::try_from(info.dtype).ok(),
        });
        let computes = |dtype: &DType| *dtype == DType::BF16 || (*dtype == DType::F16 && !device.is_cpu());
        stored.filter(computes).unwrap_or_else(|| default_dtype(device))
    }

    /// Whether one of its matrices is stored in a quantised format of GGUF, which is presented as f32.
    pub fn is_quantized(&self) -> bool {
        let is_widened = |info: &TensorInfo| info.dtype == Dtype::F32 && is_quantized(&self.canonical, info);
        self.canonical.tensors().iter().any(is_widened)
    }

    /// Refuses a plan that names a layer which the model does not have.
    ///
    /// # Errors
    /// [`RuntimeError::BadSetting`], which names the layer.
    pub fn check_plan(&self, plan: &AttentionPlan) -> Result<()> {
        let names = self.identified.expected().into_iter().map(|tensor| tensor.name);
        let layers = names.filter_map(|name| Some(learning_layer(&name)?.to_owned())).collect();
        plan.check_layers(&layers).map_err(|error| RuntimeError::BadSetting(error.to_string()))
    }

    /// As [`Self::build_with`], with all weights in memory.
    ///
    /// # Errors
    /// As [`Self::build_with`].
    pub fn build(&self, plan: &AttentionPlan, dtype: Option<DType>, device: &Device) -> Result<Box<dyn Denoiser>> {
        self.build_with(plan, device, BuildSpec { dtype, ..BuildSpec::default() })
    }

    /// Reads the weights and builds the model. On a GPU all weights are in its memory.
    ///
    /// # Errors
    /// A file cannot be read, the plan does not fit the model, or the device has no attention kernel for the dtype.
    pub fn build_with(&self, plan: &AttentionPlan, device: &Device, spec: BuildSpec) -> Result<Box<dyn Denoiser>> {
        let BuildSpec { dtype, residency, products } = spec;
        self.check_plan(plan)?;
        if let Some(dtype) = dtype {
            check_dtype(device, dtype)?;
        }
        if !device.is_cpu() {
            let in_memory = InMemoryTensors::load(&self.canonical, dtype, device)?;
            return Ok(self.architecture.build(&self.edited(in_memory), plan)?);
        }
        let source = self.edited(ConvertedSource::new(self.canonical.clone(), dtype));
        let source = SourceWithProducts { source, products };
        if residency == Residency::Streamed {
            let denoiser = self.architecture.build(&StreamedSource(Arc::new(source)), plan)?;
            return Ok(Box::new(SharedPasses(denoiser)));
        }
        Ok(SeparateSamples::if_small(self.architecture.build(&source, plan)?, self.parameters(), device))
    }

    /// Bytes of its weights as [`Self::build_with`] holds them.
    pub(crate) fn weight_bytes(&self, dtype: Option<DType>) -> WeightBytes {
        WeightBytes::of(&self.canonical, dtype)
    }

    /// Number of parameters of the transformer.
    pub fn parameters(&self) -> usize {
        self.canonical.tensors().iter().map(TensorInfo::element_count).sum::<u64>() as usize
    }
}

/// How the weights of a model are held and multiplied.
#[derive(Debug, Clone, Copy, Default)]
pub struct BuildSpec {
    /// Their dtype; `None` keeps the stored ones. On a CPU quantised matrices stay quantised in any case.
    pub dtype: Option<DType>,
    /// Where those of blocks are on a CPU.
    pub residency: Residency,
    /// How f32 activations are multiplied on a CPU.
    pub products: ProductPrecision,
}

/// The architecture that the config of `identified` describes. `path` is named in errors.
fn architecture(path: &Path, identified: &Identified, families: FamilyRegistry) -> Result<Box<dyn Architecture>> {
    let Identified { family: name, config, .. } = identified;
    let family = families.get(name).ok_or_else(|| RuntimeError::BadComponent {
        path: path.to_owned(),
        reason: format!("a model of the family {name:?}, which this version of clearform cannot run"),
    })?;
    Ok(family.parse(config)?)
}
