//! [`LoadReport`]: what became of each tensor of a checkpoint, and what a model of its sizes lacks.

use crate::manifest::config::ConfigConflict;
use crate::manifest::shape::ExpectedTensor;
use crate::mapping::suggestions::Suggestions;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Names that a nearer one is looked for: a hostile file may have a hundred thousand that nobody knows.
const MOST_LOOKED_FOR: usize = 300;
/// Names that one missing tensor would give: three of a fused projection.
const MOST_GIVEN: usize = 3;

/// What became of an input tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorOutcome {
    /// It became these tensors, or a part of them.
    Used {
        /// Names on the other side.
        names: Vec<String>,
    },
    /// It is not for us.
    Skipped {
        /// Why.
        reason: String,
    },
    /// Nobody knows what it is.
    Unmatched {
        /// Why.
        reason: String,
    },
}

/// A canonical tensor that nothing gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MissingTensor {
    /// Canonical name.
    pub name: String,
    /// The name it would have in this checkpoint, where it is another.
    pub foreign: Option<String>,
}

/// A tensor of another shape than the model's sizes ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShapeMismatch {
    /// Canonical name and shape; an extent of none may be any.
    #[serde(flatten)]
    pub expected: ExpectedTensor,
    /// Its shape in canonical form.
    pub found: Vec<usize>,
    /// The input tensor it comes from.
    pub from: String,
}

/// The fate of every input tensor, and what is missing or wrong.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LoadReport {
    /// By input name.
    pub outcomes: BTreeMap<String, TensorOutcome>,
    /// Canonical tensors that nothing gives.
    pub missing: Vec<MissingTensor>,
    /// Tensors of a wrong shape.
    pub misshapen: Vec<ShapeMismatch>,
    /// Settings that config.json and the tensors give differently.
    pub contradictions: Vec<ConfigConflict>,
    /// What names that are missing or not understood resemble: of the former a name that is not understood, of the latter
    /// one that is known.
    pub suggestions: BTreeMap<String, String>,
}

impl LoadReport {
    /// Whether nothing is missing, misshapen, unmatched or contradicted.
    pub fn complete(&self) -> bool {
        self.sufficient() && self.unmatched().next().is_none()
    }

    /// Whether nothing is missing, misshapen or contradicted.
    pub fn sufficient(&self) -> bool {
        self.missing.is_empty() && self.misshapen.is_empty() && self.contradictions.is_empty()
    }

    /// Names that nobody knows, with reasons.
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
        let unmatched = self
            .unmatched()
            .map(|(name, reason)| format!("tensor {name:?} is not understood: {reason}{}", self.hint(name)));
        let contradictions = self.contradictions.iter().map(ToString::to_string);
        contradictions.chain(missing).chain(misshapen).chain(unmatched).collect()
    }

    /// Looks for what unknown and missing names may have been meant to be; `known` are all names of the layout.
    pub(crate) fn suggest_names(&mut self, known: impl FnOnce() -> BTreeSet<String>) {
        let unknown: Vec<&str> = self.unmatched().map(|(name, _)| name).collect();
        if unknown.is_empty() {
            return;
        }
        let known = known();
        let missing: BTreeSet<&str> = self.missing.iter().map(MissingTensor::in_file).collect();
        let unknown: Vec<&str> = unknown.into_iter().filter(|name| !known.contains(*name)).collect();
        let right = Suggestions::new(missing.iter().copied().chain(known.iter().map(String::as_str)));
        let wrong = Suggestions::new(unknown.iter().copied());
        let pair = |(name, near): (&str, &str)| (name.to_owned(), near.to_owned());
        let of_unknown = unknown.iter().take(MOST_LOOKED_FOR).filter_map(|name| Some((*name, right.nearest(name)?)));
        let of_missing = missing.iter().take(MOST_LOOKED_FOR).filter_map(|name| Some((*name, wrong.nearest(name)?)));
        self.suggestions = of_unknown.chain(of_missing).map(pair).collect();
    }

    /// Names of the file that are missing, with the canonical ones that each would give where those are others.
    pub(crate) fn missing_in_file(&self) -> BTreeMap<&str, Vec<&str>> {
        self.missing.iter().fold(BTreeMap::new(), |mut names, missing| {
            let gives: &mut Vec<&str> = names.entry(missing.in_file()).or_default();
            gives.extend(missing.foreign.as_ref().map(|_| missing.name.as_str()));
            names
        })
    }

    fn describe_missing(&self, name: &str, gives: &[&str]) -> String {
        let shown: Vec<String> = gives.iter().take(MOST_GIVEN).map(|name| format!("{name:?}")).collect();
        let gives = match gives.len() - shown.len() {
            _ if gives.is_empty() => String::new(),
            0 => format!(" (it gives {})", shown.join(", ")),
            more => format!(" (it gives {} and {more} more)", shown.join(", ")),
        };
        format!("tensor {name:?} is missing{gives}{}", self.hint(name))
    }

    /// What `name` resembles, in brackets.
    pub(crate) fn hint(&self, name: &str) -> String {
        self.suggestions.get(name).map_or_else(String::new, |near| format!(" (near {near:?})"))
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        const MOST: usize = 8;
        let complaints = self.problems();
        let shown = complaints.len().min(MOST);
        f.write_str(&complaints[..shown].join("; "))?;
        match complaints.len() - shown {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl MissingTensor {
    /// Its name in this checkpoint.
    pub fn in_file(&self) -> &str {
        self.foreign.as_ref().unwrap_or(&self.name)
    }
}

impl fmt::Display for ShapeMismatch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let extent = |extent: &Option<usize>| extent.map_or("any".to_owned(), |extent| extent.to_string());
        let expected: Vec<String> = self.expected.shape.iter().map(extent).collect();
        let Self { found, from, expected: ExpectedTensor { name, .. } } = self;
        write!(f, "tensor {from:?} has a wrong shape: {name:?} expected [{}], found {found:?}", expected.join(", "))
    }
}
