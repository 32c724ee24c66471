//! [`Inspection`]: everything known about a checkpoint, to be printed as text or JSON.

use crate::detect::Identified;
use crate::manifest::conflict::ConfigConflict;
use crate::manifest::family::Variant;
use crate::mapping::assembly::CanonicalSource;
use crate::mapping::dequantized::Dequantized;
use crate::mapping::load_report::{LoadReport, MissingTensor, ShapeMismatch, TensorOutcome, UncomputableTensor};
use crate::report::cost::{CostEstimate, DistillationEstimate, PipelineScale, WeightMemory};
use clearform_weights::{Checkpoint, Dtype, TensorInfo, TensorSource, held_bytes, is_quantized};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// A component of the pipeline that cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnusableComponent {
    /// The name of its folder in a diffusers pipeline.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// A tensor in the file that is not used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnusedTensor {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// The tensors of the model that the file stores in one format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StorageFormat {
    /// The format as the file names it, and whether it has scales.
    pub format: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Their bytes in the file.
    pub bytes: u64,
}

/// What a checkpoint holds.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Whether no tensor is missing, misshapen, uncomputable or not understood, nothing is contradicted, and no
    /// component is unusable.
    pub complete: bool,
    /// Name of the family.
    pub family: String,
    /// The variant and its defaults.
    pub variant: Variant,
    /// Whether a guidance scale acts on it: FLUX.1 schnell and models distilled like it take none.
    pub takes_guidance: bool,
    /// The attention plan that is recorded for it, as text; `None` for an original model.
    pub attention: Option<String>,
    /// Name of the layout.
    pub layout: String,
    /// What every name begins with.
    pub prefix: String,
    /// Numbers of blocks by their keys in config.json.
    pub depth: BTreeMap<String, usize>,
    /// Elements of all canonical tensors.
    pub parameters: u64,
    /// Bytes of all canonical tensors in the dtypes that they are read in.
    pub bytes: u64,
    /// Number of canonical tensors by dtype.
    pub dtypes: BTreeMap<String, usize>,
    /// How the file stores the model's tensors; empty if it is not known.
    pub stored: Vec<StorageFormat>,
    /// Components of its pipeline in the same file.
    pub components: Vec<String>,
    /// Components of its pipeline, in the same file or in folders beside it, whose weights cannot be used.
    pub unusable_components: Vec<UnusableComponent>,
    /// Number of input tensors that are used.
    pub used: usize,
    /// The config.json of diffusers.
    pub config: Value,
    /// Where it was found.
    pub evidence: Vec<String>,
    /// What was assumed.
    pub notes: Vec<String>,
    /// Settings for which config.json and the tensors have different values.
    pub contradictions: Vec<ConfigConflict>,
    /// Missing tensors.
    pub missing: Vec<MissingTensor>,
    /// Tensors with the wrong shape.
    pub misshapen: Vec<ShapeMismatch>,
    /// Tensors in number formats that are not computed with.
    pub uncomputable: Vec<UncomputableTensor>,
    /// Tensors that are not understood.
    pub unmatched: Vec<UnusedTensor>,
    /// Similar names of missing tensors and of those that are not understood.
    pub suggestions: BTreeMap<String, String>,
    /// Tensors that the model does not need.
    pub skipped: Vec<UnusedTensor>,
    /// Side in pixels of the images that it was trained on, if it is known.
    pub trained_side_pixels: Option<usize>,
    /// Side in pixels of the largest image that it can generate, if there is a limit.
    pub largest_side_pixels: Option<usize>,
    /// Bytes of its weights in memory, where quantised ones stay as they are stored.
    pub held_bytes: u64,
    /// Bytes of an activation on a CPU: 2 in bf16, 4 in f32.
    pub value_bytes: usize,
    /// Estimated cost of images; nothing was measured.
    pub estimates: Vec<CostEstimate>,
    /// Bytes of memory that the weights of the other components in its pipeline take, each of which is loaded for its
    /// stage alone.
    pub component_bytes: BTreeMap<String, u64>,
    /// What distilling it takes, if that is known.
    pub distillation: Option<DistillationEstimate>,
}

impl Inspection {
    /// Collects what is known; no tensor is read.
    pub fn new<S: TensorSource>(identified: &Identified, canonical: &CanonicalSource<S>) -> Self {
        let load_report = canonical.load_report();
        let tensors = canonical.tensors();
        let bytes = tensors.iter().map(TensorInfo::byte_count).sum();
        let held_bytes = tensors.iter().map(|info| held_bytes(canonical, info, None)).sum();
        let weights = WeightMemory { bytes: held_bytes, value_bytes: value_bytes(canonical, &tensors) };
        let manifest = identified.manifest();
        let sizes = identified.sizes();
        let components = identified.components_in(canonical.source());
        Self {
            complete: load_report.is_complete(),
            family: identified.family.clone(),
            variant: identified.variant.clone(),
            takes_guidance: true,
            attention: None,
            layout: identified.layout.clone(),
            prefix: identified.prefix.clone(),
            depth: identified.depths(),
            parameters: tensors.iter().map(TensorInfo::element_count).sum(),
            bytes,
            dtypes: histogram(&tensors),
            stored: Vec::new(),
            components: components.into_iter().map(|component| component.name).collect(),
            unusable_components: Vec::new(),
            used: load_report.used(),
            config: identified.config.clone(),
            evidence: identified.evidence.clone(),
            notes: identified.notes.clone(),
            contradictions: load_report.contradictions.clone(),
            missing: load_report.missing.clone(),
            misshapen: load_report.misshapen.clone(),
            uncomputable: load_report.uncomputable.clone(),
            unmatched: unused(load_report.unmatched()),
            suggestions: load_report.suggestions.clone(),
            skipped: unused(load_report.skipped()),
            trained_side_pixels: manifest.trained_side(sizes),
            largest_side_pixels: manifest.largest_side(sizes),
            held_bytes,
            value_bytes: weights.value_bytes,
            estimates: CostEstimate::of(identified, weights, PipelineScale::usual(identified)),
            component_bytes: BTreeMap::new(),
            distillation: None,
        }
    }

    /// The same with what its pipeline shows: the sizes of its images and prompts, and the bytes of its components'
    /// weights.
    #[must_use]
    pub fn in_pipeline(
        self,
        identified: &Identified,
        scale: PipelineScale,
        component_bytes: BTreeMap<String, u64>,
    ) -> Self {
        let mut variant = self.variant;
        variant.defaults.text_tokens = scale.text_tokens;
        Self {
            variant,
            trained_side_pixels: self.trained_side_pixels.or(scale.native_side),
            estimates: CostEstimate::of(
                identified,
                WeightMemory { bytes: self.held_bytes, value_bytes: self.value_bytes },
                scale,
            ),
            component_bytes,
            ..self
        }
    }

    /// The same for a checkpoint on disk, with how the tensors are stored.
    pub fn of(identified: &Identified, checkpoint: &Dequantized<Arc<Checkpoint>>) -> Self {
        let canonical = identified.canonical(checkpoint);
        let mut formats = BTreeMap::<String, StorageFormat>::new();
        for (name, outcome) in &canonical.load_report().outcomes {
            let (TensorOutcome::Used { .. }, Some(stored)) = (outcome, checkpoint.stored(name)) else { continue };
            let empty = StorageFormat { format: stored.format.clone(), tensors: 0, bytes: 0 };
            let format = formats.entry(stored.format).or_insert(empty);
            format.tensors += 1;
            format.bytes += stored.bytes;
        }
        let mut stored: Vec<StorageFormat> = formats.into_values().collect();
        stored.sort_by_key(|format| std::cmp::Reverse(format.bytes));
        Self { stored, ..Self::new(identified, &canonical) }
    }

    /// Adds the components that cannot be used.
    #[must_use]
    pub fn with_unusable(mut self, components: Vec<UnusableComponent>) -> Self {
        self.complete &= components.is_empty();
        self.unusable_components = components;
        self
    }

    /// Whether the model is complete and every tensor is understood.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// The tensors that are missing, misshapen or not understood; those that are used are not listed.
    pub fn load_report(&self) -> LoadReport {
        let unmatched =
            |tensor: &UnusedTensor| (tensor.name.clone(), TensorOutcome::Unmatched { reason: tensor.reason.clone() });
        LoadReport {
            outcomes: self.unmatched.iter().map(unmatched).collect(),
            missing: self.missing.clone(),
            misshapen: self.misshapen.clone(),
            uncomputable: self.uncomputable.clone(),
            contradictions: self.contradictions.clone(),
            suggestions: self.suggestions.clone(),
        }
    }

    /// What is wrong, a line each.
    pub fn problems(&self) -> Vec<String> {
        let components = self.unusable_components.iter().map(ToString::to_string);
        self.load_report().problems().into_iter().chain(components).collect()
    }
}

impl fmt::Display for UnusableComponent {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

fn unused<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<UnusedTensor> {
    pairs.map(|(name, reason)| UnusedTensor { name: name.to_owned(), reason: reason.to_owned() }).collect()
}

fn histogram(tensors: &[TensorInfo]) -> BTreeMap<String, usize> {
    tensors.iter().fold(BTreeMap::new(), |mut counts, info| {
        *counts.entry(format!("{:?}", info.dtype)).or_default() += 1;
        counts
    })
}

/// Bytes of an activation on a CPU: a model whose largest tensor is quantised or in bf16 is computed in bf16.
fn value_bytes(source: &dyn TensorSource, tensors: &[TensorInfo]) -> usize {
    let largest = tensors.iter().max_by_key(|info| info.element_count());
    match largest.is_some_and(|info| info.dtype == Dtype::BF16 || is_quantized(source, info)) {
        true => 2,
        false => 4,
    }
}
