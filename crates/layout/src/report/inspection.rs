//! [`Inspection`]: all that is known of a checkpoint, to be printed as text or as JSON.

use crate::detect::Identified;
use crate::manifest::config::ConfigConflict;
use crate::manifest::family::Variant;
use crate::mapping::assembly::CanonicalSource;
use crate::mapping::dequantized::Dequantized;
use crate::mapping::load_report::{LoadReport, MissingTensor, ShapeMismatch, TensorOutcome};
use crate::report::cost::CostEstimate;
use clearform_weights::{Checkpoint, TensorInfo, TensorSource};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// An input tensor that was not used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnusedTensor {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// The model's tensors that the file keeps in one number format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StorageFormat {
    /// The format as the file calls it, and whether scales go with it.
    pub format: String,
    /// How many they are.
    pub tensors: usize,
    /// Bytes that they take.
    pub bytes: u64,
}

/// What a checkpoint holds.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Whether all of it is there and understood.
    pub complete: bool,
    /// Name of the family.
    pub family: String,
    /// The variant and its defaults.
    pub variant: Variant,
    /// Name of the layout.
    pub layout: String,
    /// What stands before every name.
    pub prefix: String,
    /// Numbers of blocks.
    pub depth: BTreeMap<String, usize>,
    /// Numbers in all canonical tensors.
    pub parameters: u64,
    /// Bytes of all canonical tensors, in the number formats that they are given in.
    pub bytes: u64,
    /// How many canonical tensors are given in which number format.
    pub dtypes: BTreeMap<String, usize>,
    /// How the file keeps the model's tensors, where it is known.
    pub stored: Vec<StorageFormat>,
    /// Parts of its pipeline that lie in the same file.
    pub components: Vec<String>,
    /// How many input tensors are used.
    pub used: usize,
    /// The diffusers config.json.
    pub config: Value,
    /// By what it was found.
    pub evidence: Vec<String>,
    /// What was taken for granted.
    pub notes: Vec<String>,
    /// Where config.json and the tensors differ.
    pub contradictions: Vec<ConfigConflict>,
    /// Tensors that are not there.
    pub missing: Vec<MissingTensor>,
    /// Tensors of a wrong shape.
    pub misshapen: Vec<ShapeMismatch>,
    /// Tensors that nobody knows.
    pub unmatched: Vec<UnusedTensor>,
    /// What names that are missing or not understood resemble.
    pub suggestions: BTreeMap<String, String>,
    /// Tensors that are not the model's.
    pub skipped: Vec<UnusedTensor>,
    /// Pixels along a side of the pictures it was trained on, where that is known.
    pub trained_side_pixels: Option<usize>,
    /// Pixels along a side of the largest picture it can draw, where there is one.
    pub largest_side_pixels: Option<usize>,
    /// Cost of pictures; nothing was measured.
    pub estimates: Vec<CostEstimate>,
}

impl Inspection {
    /// Gathers what is known; reads no tensor.
    pub fn new<S: TensorSource>(identified: &Identified, canonical: &CanonicalSource<S>) -> Self {
        let load_report = canonical.load_report();
        let tensors = canonical.tensors();
        let bytes = tensors.iter().map(TensorInfo::byte_count).sum();
        let (manifest, sizes) = (identified.manifest(), identified.sizes());
        Self {
            complete: load_report.complete(),
            family: identified.family.clone(),
            variant: identified.variant.clone(),
            layout: identified.layout.clone(),
            prefix: identified.prefix.clone(),
            depth: identified.depths(),
            parameters: tensors.iter().map(TensorInfo::element_count).sum(),
            bytes,
            dtypes: histogram(&tensors),
            stored: Vec::new(),
            components: identified.components_in(canonical.source()).into_iter().map(|part| part.name).collect(),
            used: load_report.used(),
            config: identified.config.clone(),
            evidence: identified.evidence.clone(),
            notes: identified.notes.clone(),
            contradictions: load_report.contradictions.clone(),
            missing: load_report.missing.clone(),
            misshapen: load_report.misshapen.clone(),
            unmatched: unused(load_report.unmatched()),
            suggestions: load_report.suggestions.clone(),
            skipped: unused(load_report.skipped()),
            trained_side_pixels: manifest.trained_side(sizes),
            largest_side_pixels: manifest.largest_side(sizes),
            estimates: CostEstimate::of(identified, bytes),
        }
    }

    /// The same of a checkpoint on disk, with what is known of how it is kept.
    pub fn of(identified: &Identified, checkpoint: &Dequantized<Checkpoint>) -> Self {
        let canonical = identified.canonical(checkpoint);
        let mut formats = BTreeMap::<String, StorageFormat>::new();
        for (name, outcome) in &canonical.load_report().outcomes {
            let (TensorOutcome::Used { .. }, Some(stored)) = (outcome, checkpoint.stored(name)) else { continue };
            let none = StorageFormat { format: stored.format.clone(), tensors: 0, bytes: 0 };
            let all = formats.entry(stored.format).or_insert(none);
            (all.tensors, all.bytes) = (all.tensors + 1, all.bytes + stored.bytes);
        }
        let mut stored: Vec<StorageFormat> = formats.into_values().collect();
        stored.sort_by_key(|format| std::cmp::Reverse(format.bytes));
        Self { stored, ..Self::new(identified, &canonical) }
    }

    /// Whether the model is whole and every tensor is understood.
    pub fn complete(&self) -> bool {
        self.complete
    }

    /// What is wrong.
    pub fn load_report(&self) -> LoadReport {
        let unmatched = self.unmatched.iter().map(|one| (one.name.clone(), one.reason.clone()));
        let outcome = |(name, reason)| (name, TensorOutcome::Unmatched { reason });
        LoadReport {
            outcomes: unmatched.map(outcome).collect(),
            missing: self.missing.clone(),
            misshapen: self.misshapen.clone(),
            contradictions: self.contradictions.clone(),
            suggestions: self.suggestions.clone(),
        }
    }

    /// What is wrong, a line each.
    pub fn problems(&self) -> Vec<String> {
        self.load_report().problems()
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
