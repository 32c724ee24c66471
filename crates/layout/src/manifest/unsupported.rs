//! [`UnsupportedModels`]: what is recognised though it is no supported model, and the parts of a file that are not the model.

use crate::error::LayoutError;
use crate::manifest::pattern::glob;
use serde::Deserialize;
use std::collections::BTreeSet;

/// Signatures of what is not supported, as data.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnsupportedModels {
    pub edition: u32,
    component: Vec<ComponentPrefixes>,
    refused: Vec<Signature>,
    known: Vec<Signature>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ComponentPrefixes {
    prefixes: Vec<String>,
    reason: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signature {
    name: String,
    #[serde(default)]
    any: Vec<String>,
    #[serde(default)]
    all: Vec<String>,
    #[serde(default)]
    none: Vec<String>,
    remedy: Option<String>,
}

impl UnsupportedModels {
    /// What makes these tensors no model, whatever family they look like. Where components stand beside others, the
    /// others alone are looked at: a quantised text encoder does not make a quantised model.
    pub fn refuse(&self, names: &BTreeSet<&str>) -> Result<(), LayoutError> {
        let others: BTreeSet<&str> = names.iter().copied().filter(|name| self.component(name).is_none()).collect();
        check_signatures(&self.refused, if others.is_empty() { names } else { &others })
    }

    /// A family or a component that is known but not supported.
    pub fn recognise(&self, names: &BTreeSet<&str>) -> Result<(), LayoutError> {
        check_signatures(&self.known, names)
    }

    /// Why the tensor `name` of an all-in-one file is not the model's.
    pub fn component(&self, name: &str) -> Option<&str> {
        let holds =
            |component: &&ComponentPrefixes| component.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()));
        self.component.iter().find(holds).map(|component| component.reason.as_str())
    }
}

fn check_signatures(signatures: &[Signature], names: &BTreeSet<&str>) -> Result<(), LayoutError> {
    match signatures.iter().find_map(|signature| signature.fits(names).map(|name| (signature, name))) {
        None => Ok(()),
        Some((signature, name)) => Err(LayoutError::Unsupported {
            name: signature.name.clone(),
            evidence: format!("tensor {name:?}"),
            remedy: signature.remedy.clone().unwrap_or_else(|| "no family of this program reads it yet".to_owned()),
        }),
    }
}

impl Signature {
    /// The tensor by which it fits.
    fn fits<'a>(&self, names: &BTreeSet<&'a str>) -> Option<&'a str> {
        let find = |pattern: &String| find(pattern, names);
        let witness = self.any.iter().find_map(find).or_else(|| self.all.first().and_then(find))?;
        let all = self.all.iter().all(|pattern| find(pattern).is_some());
        let none = self.none.iter().all(|pattern| find(pattern).is_none());
        (all && none).then_some(witness)
    }
}

/// The first of `names` that fits `pattern`.
pub(crate) fn find<'a>(pattern: &str, names: &BTreeSet<&'a str>) -> Option<&'a str> {
    match pattern.contains('*') {
        true => names.iter().find(|name| glob(pattern, name)).copied(),
        false => names.get(pattern).copied(),
    }
}
