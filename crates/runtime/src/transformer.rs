//! [`Transformer`]: a transformer that is recognised and open, but not yet built. It knows nothing of the other parts
//! of a pipeline.

use crate::{Components, Result, RuntimeError};
use candle_core::{DType, Device};
use clearform_attention::AttentionPlan;
use clearform_layout::{CanonicalSource, Dequantized, Hints, Identified, LoadReport, Manifests, detect};
use clearform_models::{Denoiser, FAMILIES, Family};
use clearform_plugin_host::{LowRankMode, PatchedSource, WeightEdits};
use clearform_portable_model::PortableModel;
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// How a checkpoint's tensors are to be read.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// The rules of families and layouts.
    pub manifests: Manifests,
    /// What the user says of the checkpoint.
    pub hints: Hints,
    /// Go on although tensors of the checkpoint have no counterpart.
    pub allow_unmatched: bool,
}

/// A transformer on disk, under its canonical names.
pub struct Transformer {
    family: &'static dyn Family,
    identified: Identified,
    canonical: CanonicalSource<Dequantized<Checkpoint>>,
    edits: Arc<WeightEdits>,
    low_rank: LowRankMode,
}

/// The part of a pipeline that this is, as adapters call it.
pub(crate) const TRANSFORMER: &str = "transformer";

impl ReadOptions {
    /// The program's own rules, and no hints.
    ///
    /// # Errors
    /// The program was built with a broken manifest.
    pub fn default_options() -> Result<Self> {
        Ok(Self { manifests: Manifests::embedded()?, hints: Hints::default(), allow_unmatched: false })
    }

    /// The same, with what the model at `path` records of itself where nothing else was said, if it is a portable one.
    ///
    /// # Errors
    /// Its record cannot be read, or its files are not as recorded.
    pub fn recorded(mut self, path: &Path) -> Result<Self> {
        if PortableModel::recognise(path) {
            let model = PortableModel::open(path)?;
            self.hints.family.get_or_insert_with(|| model.record().family.clone());
            self.hints.variant.get_or_insert_with(|| model.record().variant.clone());
        }
        Ok(self)
    }

    /// For the original of the portable model `model`, which is of the same family, variant and sizes. The original tells
    /// them itself where it can.
    ///
    /// # Errors
    /// As [`Self::recorded`].
    pub fn of_original(self, original: &Path, model: &Path) -> Result<Self> {
        let components = Components::new(original, None);
        if components.transformer().join("config.json").exists() || !PortableModel::recognise(model) {
            return self.recorded(original);
        }
        let mut reading = self.recorded(model)?;
        let config = Components::new(model, None).json("transformer", "config.json")?;
        reading.hints.config.get_or_insert(config);
        Ok(reading)
    }
}

impl Transformer {
    /// Opens the transformer at `path`, a folder or a file in any layout, and holds it against what its sizes ask
    /// for. No weights are read.
    ///
    /// # Errors
    /// The files are damaged, are of no supported family, or tensors are missing, misshapen or not understood.
    pub fn open(path: &Path, reading: &ReadOptions) -> Result<Self> {
        let checkpoint = Dequantized::open(path, &reading.manifests)?;
        let identified = detect(&checkpoint, &reading.manifests, &reading.hints)?;
        let family = FAMILIES.iter().find(|family| family.name() == identified.family).copied();
        let family = family.ok_or_else(|| RuntimeError::BadComponent {
            path: path.to_owned(),
            reason: format!(
                "a model of the family {:?}, which this version of clearform cannot run",
                identified.family
            ),
        })?;
        let canonical = identified.canonical(checkpoint);
        let canonical = if reading.allow_unmatched { canonical.sufficient()? } else { canonical.complete()? };
        let (edits, low_rank) = (Arc::default(), LowRankMode::default());
        Ok(Self { family, identified, canonical, edits, low_rank })
    }

    /// The same with the edits of adapters, which may widen its input.
    ///
    /// # Errors
    /// A tensor has extents that no model of the family has.
    pub fn patched(mut self, edits: Arc<WeightEdits>, low_rank: LowRankMode, manifests: &Manifests) -> Result<Self> {
        (self.edits, self.low_rank) = (edits, low_rank);
        if self.edits.touch(TRANSFORMER) {
            let resized = self.identified.resized(&self.source(), manifests)?;
            resized.canonical(self.source()).complete()?;
            // A model of the same sizes stays the variant that it was, or was said to be.
            if resized.config != self.identified.config {
                self.identified = resized;
            }
        }
        Ok(self)
    }

    /// Its family.
    pub fn family(&self) -> &'static dyn Family {
        self.family
    }

    /// What it was found to be, with the defaults of its variant.
    pub fn identified(&self) -> &Identified {
        &self.identified
    }

    /// Its sizes, as the config.json of its diffusers class.
    pub fn config(&self) -> &Value {
        &self.identified.config
    }

    /// The files it lies in.
    pub fn checkpoint(&self) -> &Checkpoint {
        self.canonical.source().source()
    }

    /// What became of each tensor in those files.
    pub fn load_report(&self) -> &LoadReport {
        self.canonical.load_report()
    }

    /// Its tensors, in canonical names, as adapters edit them.
    pub fn source(&self) -> impl TensorSource + '_ {
        self.edited(&self.canonical)
    }

    fn edited<S: TensorSource>(&self, source: S) -> PatchedSource<'_, S> {
        PatchedSource::new(source, &self.edits, TRANSFORMER, self.low_rank)
    }

    /// The number format of its largest tensor, if `device` computes with it; f32 else. A CPU has no kernels for f16, whose
    /// range some norms leave.
    pub fn dtype(&self, device: &Device) -> DType {
        let tensors = self.canonical.tensors();
        let largest = tensors.iter().max_by_key(|info| info.shape.iter().product::<usize>());
        let stored = largest.and_then(|info| DType::try_from(info.dtype).ok());
        let computes = |dtype: &DType| *dtype == DType::BF16 || (*dtype == DType::F16 && !device.is_cpu());
        stored.filter(computes).unwrap_or(DType::F32)
    }

    /// Reads the weights and builds the model. Without a `dtype` they keep their stored number formats.
    ///
    /// # Errors
    /// The system refuses, or the plan does not fit the model.
    pub fn build(&self, plan: &AttentionPlan, dtype: Option<DType>, device: &Device) -> Result<Box<dyn Denoiser>> {
        if dtype.is_none() && device.is_cpu() {
            return Ok(self.family.build(self.config(), &self.source(), plan)?);
        }
        let resident = InMemoryTensors::load(&self.canonical, dtype, device)?;
        Ok(self.family.build(self.config(), &self.edited(&resident), plan)?)
    }
}
