//! [`EmbeddedComponent`]: a component of a pipeline in the same file as its transformer, and [`OpenComponent`], the
//! same under its canonical names. The rules of its kind are in `manifests/components/`, in the same notation as
//! families.

use crate::detect::hints::Hints;
use crate::detect::{Identified, Sidecar, detect_dequantized};
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

/// A component of a pipeline in the same file as its transformer.
#[derive(Debug, Clone)]
pub struct EmbeddedComponent {
    /// The name of its folder in a diffusers pipeline.
    pub name: String,
    /// What its tensor names begin with.
    pub prefix: String,
    variant: String,
    rule: Arc<ComponentRule>,
    unsupported: Arc<UnsupportedModels>,
}

/// A component of a pipeline under its canonical names.
#[derive(Debug)]
pub struct OpenComponent<S> {
    /// Its config.json, complete.
    pub config: Value,
    /// Its tensors, and what became of those in the file.
    pub tensors: CanonicalSource<Dequantized<PrefixView<S>>>,
}

impl Identified {
    /// The components of its pipeline that have tensors in `file`, which is the source it was detected in.
    pub fn components_in(&self, file: &dyn TensorSource) -> Vec<EmbeddedComponent> {
        let tensors = file.tensors();
        let has_tensors = |prefix: &&String| tensors.iter().any(|info| info.name.starts_with(prefix.as_str()));
        let embedded = |rule: &Arc<ComponentRule>| {
            Some(EmbeddedComponent {
                name: rule.raw.name.clone(),
                prefix: rule.raw.prefixes.iter().find(has_tensors)?.clone(),
                variant: self.variant.name.clone(),
                rule: rule.clone(),
                unsupported: self.unsupported().clone(),
            })
        };
        self.manifest().component_rules.iter().filter_map(embedded).collect()
    }
}

impl EmbeddedComponent {
    /// Maps the component's tensors in `file` by the rules of its kind. `config` may be a config.json of such a
    /// component; it is used only if the tensors and the family leave something open, because it may belong to another
    /// file. Scales of fp8 are read, weights are not.
    ///
    /// # Errors
    /// As [`crate::detect()`]. Tensors that are missing or not understood are in the load report.
    pub fn open<S: TensorSource>(&self, file: S, config: Option<&Value>) -> Result<OpenComponent<S>> {
        let RawComponent { kind, unused, identity, .. } = &self.rule.raw;
        let mut view = PrefixView::new(file, &self.prefix).without(unused.keys());
        if let Some([name, like]) = identity {
            view = view.with_identity(name, like)?;
        }
        let manifests = Manifests::for_component(self.manifest(), &self.unsupported);
        let dequantized = Dequantized::new(view, &manifests)?;
        let hints = Hints { family: Some(kind.clone()), ..Hints::default() };
        let metadata = BTreeMap::new();
        let detect_with =
            |config| detect_dequantized(&dequantized, Sidecar { config, metadata: &metadata }, &manifests, &hints);
        let identified = match detect_with(None) {
            Err(LayoutError::Ambiguous { .. }) if config.is_some() => detect_with(config)?,
            found => found?,
        };
        let mut tensors = identified.canonical(dequantized);
        let skipped: Vec<_> = tensors.source().source().hidden().map(str::to_owned).collect();
        skipped.into_iter().for_each(|name| tensors.skip(&name, &unused[&name]));
        Ok(OpenComponent { config: identified.config, tensors })
    }

    /// The rules of its kind, with the settings that the family's files have in common.
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
