//! [`EmbeddedComponent`]: a part of a pipeline that lies in the file of its transformer, and [`OpenComponent`], the same opened by the rules
//! of its kind. The kinds stand in `manifests/parts/`, as families do; it knows none of them.

use crate::detect::hints::Hints;
use crate::detect::{Identified, Sidecar, detect_unscaled};
use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use crate::manifest::family::{ComponentRule, FamilyManifest, RawComponent};
use crate::manifest::unsupported::UnsupportedModels;
use crate::mapping::assembly::CanonicalSource;
use crate::mapping::dequantized::Dequantized;
use crate::mapping::prefix_view::PrefixView;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A part of a pipeline that lies in the file of its transformer.
#[derive(Debug, Clone)]
pub struct EmbeddedComponent {
    /// Name of its folder in a pipeline.
    pub name: String,
    /// What stands before the names of its tensors.
    pub prefix: String,
    variant: String,
    rule: Arc<ComponentRule>,
    known: Arc<UnsupportedModels>,
}

/// A part of a pipeline under its canonical names.
#[derive(Debug)]
pub struct OpenComponent<S> {
    /// Its config.json, complete.
    pub config: Value,
    /// Its tensors, and what became of those in the file.
    pub tensors: CanonicalSource<Dequantized<PrefixView<S>>>,
}

impl Identified {
    /// The parts of its pipeline of which tensors lie in `file`, where it was found itself.
    pub fn components_in(&self, file: &dyn TensorSource) -> Vec<EmbeddedComponent> {
        let tensors = file.tensors();
        let holds = |prefix: &&String| tensors.iter().any(|info| info.name.starts_with(prefix.as_str()));
        let inside = |rule: &Arc<ComponentRule>| {
            Some(EmbeddedComponent {
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

impl EmbeddedComponent {
    /// Holds the part's tensors in `file` against the rules of its kind. `config` may be a config.json of such a part; it
    /// is asked where neither the tensors nor the family tell something. Scales of fp8 are read, weights are not.
    ///
    /// # Errors
    /// As [`crate::detect`]. What is missing or not understood is in the account of the tensors.
    pub fn open<S: TensorSource>(&self, file: S, config: Option<&Value>) -> Result<OpenComponent<S>> {
        let RawComponent { kind, unused, identity, .. } = &self.rule.raw;
        let mut under = PrefixView::new(file, &self.prefix).without(unused.keys());
        if let Some([name, like]) = identity {
            under = under.with_identity(name, like)?;
        }
        let manifests = Manifests::for_component(self.manifest(), &self.known);
        let dequantized = Dequantized::new(under, &manifests)?;
        let hints = Hints { family: Some(kind.clone()), ..Hints::default() };
        let metadata = BTreeMap::new();
        let detect =
            |config| detect_unscaled(&dequantized, Sidecar { config, metadata: &metadata }, &manifests, &hints);
        let identified = match detect(None) {
            Err(LayoutError::Ambiguous { .. }) if config.is_some() => detect(config)?,
            found => found?,
        };
        let mut tensors = identified.canonical(dequantized);
        let skipped: Vec<_> = tensors.source().source().hidden().map(str::to_owned).collect();
        skipped.into_iter().for_each(|name| tensors.skip(&name, &unused[&name]));
        Ok(OpenComponent { config: identified.config, tensors })
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
