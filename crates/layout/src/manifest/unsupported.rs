//! [`UnsupportedModels`]: models that are recognised but not supported, so that an error can name them, and the name
//! prefixes of components in a transformer's file.

use crate::error::LayoutError;
use crate::manifest::pattern::glob;
use serde::Deserialize;
use std::collections::BTreeSet;

/// The content of `manifests/unsupported.toml`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnsupportedModels {
    pub edition: u32,
    /// Tensors of a file that are not the transformer's.
    component: Vec<ComponentPrefixes>,
    /// Checked before families: adapters and quantised models have a family's names too.
    refused: Vec<Signature>,
    /// Checked after families: models that no family fits.
    recognised: Vec<Signature>,
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
    /// An error if these are the tensors of an adapter or a quantised model, whatever family they look like. In a file
    /// with components only the other tensors count: a quantised text encoder does not make the transformer quantised.
    pub fn refuse(&self, names: &BTreeSet<&str>) -> Result<(), LayoutError> {
        let others: BTreeSet<&str> = names.iter().copied().filter(|name| self.component(name).is_none()).collect();
        check_signatures(&self.refused, if others.is_empty() { names } else { &others })
    }

    /// An error if these are the tensors of a model that is known but not supported, or of a component.
    pub fn recognise(&self, names: &BTreeSet<&str>) -> Result<(), LayoutError> {
        check_signatures(&self.recognised, names)
    }

    /// Which component the tensor `name` belongs to, if it is not the transformer's.
    pub fn component(&self, name: &str) -> Option<&str> {
        let has_prefix =
            |component: &&ComponentPrefixes| component.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()));
        self.component.iter().find(has_prefix).map(|component| component.reason.as_str())
    }
}

fn check_signatures(signatures: &[Signature], names: &BTreeSet<&str>) -> Result<(), LayoutError> {
    match signatures.iter().find_map(|signature| signature.fits(names).map(|name| (signature, name))) {
        None => Ok(()),
        Some((signature, name)) => Err(LayoutError::Unsupported {
            name: signature.name.clone(),
            evidence: format!("tensor {name:?}"),
            remedy: signature.remedy.clone().unwrap_or_else(|| "clearform does not support it yet".to_owned()),
        }),
    }
}

impl Signature {
    /// A tensor that matches, if the signature fits.
    fn fits<'a>(&self, names: &BTreeSet<&'a str>) -> Option<&'a str> {
        let find = |pattern: &String| find(pattern, names);
        let witness = self.any.iter().find_map(find).or_else(|| self.all.first().and_then(find))?;
        let has_all = self.all.iter().all(|pattern| find(pattern).is_some());
        let has_none = self.none.iter().all(|pattern| find(pattern).is_none());
        (has_all && has_none).then_some(witness)
    }
}

/// The first of `names` that matches `pattern`.
pub(crate) fn find<'a>(pattern: &str, names: &BTreeSet<&'a str>) -> Option<&'a str> {
    match pattern.contains('*') {
        true => names.iter().find(|name| glob(pattern, name)).copied(),
        false => names.get(pattern).copied(),
    }
}
