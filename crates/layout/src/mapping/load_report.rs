//! [`LoadReport`]: what became of each tensor of a checkpoint, and which tensors are missing or misshapen.

use crate::manifest::conflict::ConfigConflict;
use crate::manifest::shape::ExpectedTensor;
use crate::mapping::suggestions::Suggestions;
use clearform_weights::{TensorInfo, is_weight_dtype};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Names for which a similar one is searched. The search compares every pair of names, and a hostile file may have a
/// hundred thousand unknown ones.
const MOST_SEARCHED: usize = 300;
/// Canonical names that a message lists for one missing tensor: a fused projection has three.
const MOST_LISTED: usize = 3;
/// Problems that the message of an error lists.
const MOST_PROBLEMS: usize = 8;

/// The number formats of weights, and what to do about others.
const COMPUTABLE: &str = "F64, F32, F16, BF16, F8_E4M3 or F8_E5M2";
const REMEDY: &str = "it belongs to a quantised model, so use the bf16, fp16, fp8 or GGUF file of the same model";

/// What became of an input tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorOutcome {
    /// It is all or part of these tensors.
    Used {
        /// Names of the outputs.
        names: Vec<String>,
    },
    /// It is known and not needed.
    Skipped {
        /// Why.
        reason: String,
    },
    /// It is unknown, or does not fit its rule.
    Unmatched {
        /// Why.
        reason: String,
    },
}

/// A canonical tensor that the checkpoint lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MissingTensor {
    /// Canonical name.
    pub name: String,
    /// Its name in the layout of this checkpoint, if that is another.
    pub foreign: Option<String>,
}

/// A tensor whose shape does not follow from the model's sizes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShapeMismatch {
    /// Canonical name and expected shape.
    #[serde(flatten)]
    pub expected: ExpectedTensor,
    /// Its shape after mapping to the canonical tensor.
    pub found: Vec<usize>,
    /// The tensor in the file that it comes from.
    pub from: String,
}

/// A tensor that the model uses, in a number format that models do not compute with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UncomputableTensor {
    /// Its name in the file.
    pub name: String,
    /// Its format.
    pub found: String,
}

/// The outcome of every input tensor, and what is missing or wrong.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LoadReport {
    /// By input name.
    pub outcomes: BTreeMap<String, TensorOutcome>,
    /// Canonical tensors that the checkpoint lacks.
    pub missing: Vec<MissingTensor>,
    /// Tensors with the wrong shape.
    pub misshapen: Vec<ShapeMismatch>,
    /// Tensors in number formats that are not computed with, such as those of quantised models.
    pub uncomputable: Vec<UncomputableTensor>,
    /// Settings for which config.json and the tensors have different values.
    pub contradictions: Vec<ConfigConflict>,
    /// Similar names: for a missing tensor an unknown one of the file, for an unknown tensor one that the model has.
    pub suggestions: BTreeMap<String, String>,
}

impl LoadReport {
    /// Whether nothing is missing, misshapen, uncomputable, unmatched or contradicted.
    pub fn is_complete(&self) -> bool {
        self.is_sufficient() && self.unmatched().next().is_none()
    }

    /// Whether nothing is missing, misshapen, uncomputable or contradicted.
    pub fn is_sufficient(&self) -> bool {
        let has_all = self.missing.is_empty() && self.misshapen.is_empty();
        has_all && self.uncomputable.is_empty() && self.contradictions.is_empty()
    }

    /// Tensors that are not understood, with reasons.
    pub fn unmatched(&self) -> impl Iterator<Item = (&str, &str)> {
        self.outcomes.iter().filter_map(|(name, outcome)| match outcome {
            TensorOutcome::Unmatched { reason } => Some((name.as_str(), reason.as_str())),
            _ => None,
        })
    }

    /// Names that are not for us, with reasons.
    pub fn skipped(&self) -> impl Iterator<Item = (&str, &str)> {
        self.outcomes.iter().filter_map(|(name, outcome)| match outcome {
            TensorOutcome::Skipped { reason } => Some((name.as_str(), reason.as_str())),
            _ => None,
        })
    }

    /// How many input tensors were used.
    pub fn used(&self) -> usize {
        self.outcomes.values().filter(|outcome| matches!(outcome, TensorOutcome::Used { .. })).count()
    }

    /// What is wrong, a line each.
    pub fn problems(&self) -> Vec<String> {
        let missing = self.missing_in_file().into_iter().map(|(name, gives)| self.describe_missing(name, &gives));
        let misshapen = self.misshapen.iter().map(ToString::to_string);
        let describe_unmatched =
            |(name, reason)| format!("tensor {name:?} is not understood: {reason}{}", self.hint(name));
        let unmatched = self.unmatched().map(describe_unmatched);
        let contradictions = self.contradictions.iter().map(ToString::to_string);
        let uncomputable = self.uncomputable.iter().map(ToString::to_string);
        contradictions.chain(missing).chain(misshapen).chain(uncomputable).chain(unmatched).collect()
    }

    /// Searches for names similar to those of unknown and missing tensors. `known` are all names that the model has in
    /// the layout.
    pub(crate) fn suggest_names(&mut self, known: impl FnOnce() -> BTreeSet<String>) {
        let unknown: Vec<&str> = self.unmatched().map(|(name, _)| name).collect();
        if unknown.is_empty() {
            return;
        }
        let known = known();
        let missing: BTreeSet<&str> = self.missing.iter().map(MissingTensor::in_file).collect();
        let unknown: Vec<&str> = unknown.into_iter().filter(|name| !known.contains(*name)).collect();
        // Missing names come first: of two equally similar ones, the missing one is what was meant.
        let right = Suggestions::new(missing.iter().copied().chain(known.iter().map(String::as_str)));
        let wrong = Suggestions::new(unknown.iter().copied());
        let to_owned = |(name, similar): (&str, &str)| (name.to_owned(), similar.to_owned());
        let of_unknown = unknown.iter().take(MOST_SEARCHED).filter_map(|name| Some((*name, right.nearest(name)?)));
        let of_missing = missing.iter().take(MOST_SEARCHED).filter_map(|name| Some((*name, wrong.nearest(name)?)));
        self.suggestions = of_unknown.chain(of_missing).map(to_owned).collect();
    }

    /// The missing names of the file, each with the canonical names that need it, if those are others.
    pub(crate) fn missing_in_file(&self) -> BTreeMap<&str, Vec<&str>> {
        self.missing.iter().fold(BTreeMap::new(), |mut names, missing| {
            let canonical: &mut Vec<&str> = names.entry(missing.in_file()).or_default();
            canonical.extend(missing.foreign.as_ref().map(|_| missing.name.as_str()));
            names
        })
    }

    fn describe_missing(&self, name: &str, canonical: &[&str]) -> String {
        let shown: Vec<String> = canonical.iter().take(MOST_LISTED).map(|name| format!("{name:?}")).collect();
        let purpose = match canonical.len() - shown.len() {
            _ if canonical.is_empty() => String::new(),
            0 => format!(" (needed for {})", shown.join(", ")),
            more => format!(" (needed for {} and {more} more)", shown.join(", ")),
        };
        format!("tensor {name:?} is missing{purpose}{}", self.hint(name))
    }

    /// The name that `name` was probably meant to be, in brackets, if there is one.
    pub(crate) fn hint(&self, name: &str) -> String {
        self.suggestions.get(name).map_or_else(String::new, |similar| format!(" (maybe {similar:?})"))
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let problems = self.problems();
        let shown = problems.len().min(MOST_PROBLEMS);
        f.write_str(&problems[..shown].join("; "))?;
        match problems.len() - shown {
            0 => {}
            more => write!(f, "; and {more} more")?,
        }
        match self.is_sufficient() && !problems.is_empty() {
            true => f.write_str("; --allow-unmatched goes on without what is not understood"),
            false => Ok(()),
        }
    }
}

impl MissingTensor {
    /// Its name in the layout of the checkpoint.
    pub fn in_file(&self) -> &str {
        self.foreign.as_ref().unwrap_or(&self.name)
    }
}

impl UncomputableTensor {
    /// The tensor `info` of a file, unless models compute with its dtype.
    pub(crate) fn of(info: &TensorInfo) -> Option<Self> {
        let found = format!("{:?}", info.dtype);
        (!is_weight_dtype(info.dtype)).then(|| Self { name: info.name.clone(), found })
    }
}

impl fmt::Display for UncomputableTensor {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { name, found } = self;
        write!(
            f,
            "tensor {name:?} is stored in {found}, which cannot be computed with: expected {COMPUTABLE}; {REMEDY}"
        )
    }
}

impl fmt::Display for ShapeMismatch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let size = |size: &Option<usize>| size.map_or("any".to_owned(), |size| size.to_string());
        let expected: Vec<String> = self.expected.shape.iter().map(size).collect();
        let Self { found, from, expected: ExpectedTensor { name, .. } } = self;
        write!(f, "tensor {from:?} has the wrong shape: {name:?} expected [{}], found {found:?}", expected.join(", "))
    }
}
