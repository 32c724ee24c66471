//! [`Inside`]: a part of a pipeline that lies in the file of its transformer, and [`Part`], the same opened by the rules
//! of its kind. The kinds stand in `manifests/parts/`, as families do; it knows none of them.

use crate::assembly::Canonical;
use crate::detect::{Beside, Hints, Identified, detect_unscaled};
use crate::error::{LayoutError, Result};
use crate::family::FamilyManifest;
use crate::known::Known;
use crate::manifests::Manifests;
use crate::under::Under;
use crate::unscaled::Unscaled;
use clearform_weights::TensorSource;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A part as the manifest of a family gives it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawPart {
    name: String,
    /// The manifest that has its rules.
    kind: String,
    prefixes: Vec<String>,
    /// Settings that no tensor of it shows, where config.json does not say otherwise.
    #[serde(default)]
    settings: Map<String, Value>,
    /// More of them, by variant of the family.
    #[serde(default)]
    variants: BTreeMap<String, Map<String, Value>>,
    /// Tensors that the family has no use for, and why.
    #[serde(default)]
    unused: BTreeMap<String, String>,
    /// A tensor that is the identity for this family, and one that has as many rows.
    identity: Option<[String; 2]>,
}

/// A part of a family's files, and the rules of its kind.
#[derive(Debug)]
pub(crate) struct PartRule {
    raw: RawPart,
    manifest: Arc<FamilyManifest>,
}

/// A part of a pipeline that lies in the file of its transformer.
#[derive(Debug, Clone)]
pub struct Inside {
    /// Name of its folder in a pipeline.
    pub name: String,
    /// What stands before the names of its tensors.
    pub prefix: String,
    variant: String,
    rule: Arc<PartRule>,
    known: Arc<Known>,
}

/// A part of a pipeline under its canonical names.
#[derive(Debug)]
pub struct Part<S> {
    /// Its config.json, complete.
    pub config: Value,
    /// Its tensors, and what became of those in the file.
    pub tensors: Canonical<Unscaled<Under<S>>>,
}

impl PartRule {
    /// Finds the rules of the kind; the error says what is wrong.
    pub fn new(raw: RawPart, kinds: &[Arc<FamilyManifest>]) -> std::result::Result<Self, String> {
        let manifest = kinds.iter().find(|kind| kind.name == raw.kind).cloned();
        let manifest = manifest.ok_or_else(|| format!("part {:?} is of the kind {:?}: unknown", raw.name, raw.kind))?;
        Ok(Self { raw, manifest })
    }
}

impl Identified {
    /// The parts of its pipeline of which tensors lie in `file`, where it was found itself.
    pub fn parts_in(&self, file: &dyn TensorSource) -> Vec<Inside> {
        let tensors = file.tensors();
        let holds = |prefix: &&String| tensors.iter().any(|info| info.name.starts_with(prefix.as_str()));
        let inside = |rule: &Arc<PartRule>| {
            Some(Inside {
                name: rule.raw.name.clone(),
                prefix: rule.raw.prefixes.iter().find(holds)?.clone(),
                variant: self.variant.name.clone(),
                rule: rule.clone(),
                known: self.known().clone(),
            })
        };
        self.manifest().parts.iter().filter_map(inside).collect()
    }
}

impl Inside {
    /// Holds the part's tensors in `file` against the rules of its kind. `config` may be a config.json of such a part; it
    /// is asked where neither the tensors nor the family tell something. Scales of fp8 are read, weights are not.
    ///
    /// # Errors
    /// As [`crate::detect`]. What is missing or not understood is in the account of the tensors.
    pub fn open<S: TensorSource>(&self, file: S, config: Option<&Value>) -> Result<Part<S>> {
        let RawPart { kind, unused, identity, .. } = &self.rule.raw;
        let mut under = Under::new(file, &self.prefix).without(unused.keys());
        if let Some([name, like]) = identity {
            under = under.with_identity(name, like)?;
        }
        let manifests = Manifests::of_kind(self.manifest(), &self.known);
        let unscaled = Unscaled::new(under, &manifests)?;
        let hints = Hints { family: Some(kind.clone()), ..Hints::default() };
        let metadata = BTreeMap::new();
        let detect = |config| detect_unscaled(&unscaled, Beside { config, metadata: &metadata }, &manifests, &hints);
        let identified = match detect(None) {
            Err(LayoutError::Ambiguous { .. }) if config.is_some() => detect(config)?,
            found => found?,
        };
        let mut tensors = identified.canonical(unscaled);
        let skipped: Vec<_> = tensors.source().source().hidden().map(str::to_owned).collect();
        skipped.into_iter().for_each(|name| tensors.skip(&name, &unused[&name]));
        Ok(Part { config: identified.config, tensors })
    }

    /// The rules of its kind, with what this family's files have alike.
    fn manifest(&self) -> FamilyManifest {
        let mut manifest = (*self.rule.manifest).clone();
        let of_variant = self.rule.raw.variants.get(&self.variant);
        for (key, value) in self.rule.raw.settings.iter().chain(of_variant.into_iter().flatten()) {
            for layout in &mut manifest.layouts {
                layout.settings.insert(key.clone(), value.clone());
            }
        }
        manifest
    }
}
