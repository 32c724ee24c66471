//! [`EmbeddedComponent`]: a component of a pipeline in the same file as its transformer, or in one of its own, and
//! [`OpenComponent`], the same under its canonical names. The rules of its kind are in `manifests/components/`, in the
//! same notation as families.

use crate::detect::hints::Hints;
use crate::detect::{Identified, Sidecar, detect_dequantized};
use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use crate::manifest::family::{ComponentRule, FamilyManifest, Layout, RawComponent};
use crate::manifest::one_or_many::OneOrMany;
use crate::manifest::unsupported::UnsupportedModels;
use crate::mapping::assembly::CanonicalSource;
use crate::mapping::dequantized::Dequantized;
use crate::mapping::prefix_view::PrefixView;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A component of a pipeline in the same file as its transformer, or in one of its own.
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

    /// The names of the components that may be in files of their own, by what users call such files.
    pub fn component_files(&self) -> BTreeMap<&str, &str> {
        let rules = self.manifest().component_rules.iter();
        rules.filter_map(|rule| Some((rule.raw.file.as_deref()?, rule.raw.name.as_str()))).collect()
    }

    /// The component in `file`, a file of its own that users call `called`, such as "t5xxl".
    ///
    /// # Errors
    /// [`LayoutError::NoSuch`] if the family has no such component, [`LayoutError::Unsupported`] or
    /// [`LayoutError::Ambiguous`] if the file has no such component or several.
    pub fn component_in_own_file(&self, called: &str, file: &dyn TensorSource) -> Result<EmbeddedComponent> {
        let mut rules = self.manifest().component_rules.iter();
        let rule = rules.find(|rule| rule.raw.file.as_deref() == Some(called)).ok_or_else(|| LayoutError::NoSuch {
            kind: "component of this family",
            name: called.to_owned(),
            choices: self.component_files().into_keys().map(str::to_owned).collect(),
        })?;
        self.component_by_rule(rule, file)
    }

    /// The component `name`, whose weights are `tensors`; `None` if the family has no rules for it.
    ///
    /// # Errors
    /// [`LayoutError::Unsupported`] or [`LayoutError::Ambiguous`] if the tensors are of no such component or several.
    pub fn component_named(&self, name: &str, tensors: &dyn TensorSource) -> Result<Option<EmbeddedComponent>> {
        let rule = self.manifest().component_rules.iter().find(|rule| rule.raw.name == name);
        rule.map(|rule| self.component_by_rule(rule, tensors)).transpose()
    }

    fn component_by_rule(&self, rule: &Arc<ComponentRule>, file: &dyn TensorSource) -> Result<EmbeddedComponent> {
        let tensors = file.tensors();
        let names: BTreeSet<&str> = tensors.iter().map(|info| info.name.as_str()).collect();
        Ok(EmbeddedComponent {
            name: rule.raw.name.clone(),
            prefix: rule.prefix_in(&names, self.unsupported())?,
            variant: self.variant.name.clone(),
            rule: rule.clone(),
            unsupported: self.unsupported().clone(),
        })
    }
}

impl ComponentRule {
    /// What the names of the component begin with in a file of its own: writers add different prefixes.
    fn prefix_in(&self, names: &BTreeSet<&str>, unsupported: &UnsupportedModels) -> Result<String> {
        let prefixes: BTreeSet<&str> =
            self.manifest.layouts.iter().flat_map(|layout| layout.prefixes_in(names)).collect();
        let usual = self.raw.prefixes.iter().map(String::as_str).find(|usual| prefixes.contains(usual));
        match (usual, prefixes.first().copied(), prefixes.len()) {
            (Some(prefix), ..) | (None, Some(prefix), 1) => Ok(prefix.to_owned()),
            (None, None, _) => unsupported.recognise(names).map(|()| String::new()),
            (None, Some(_), _) => Err(LayoutError::Ambiguous {
                what: format!("which of several is the {}", self.raw.name),
                reason: format!("they begin with {prefixes:?}; pass a file with one of them"),
            }),
        }
    }
}

impl Layout {
    /// What the names of this layout's signature begin with, wherever all of it is present.
    fn prefixes_in<'a>(&self, names: &BTreeSet<&'a str>) -> Vec<&'a str> {
        let Some(first) = self.present.first() else { return Vec::new() };
        let prefixes = names.iter().filter_map(|name| name.strip_suffix(first.as_str()));
        let prefixes = prefixes.filter(|prefix| prefix.is_empty() || prefix.ends_with('.'));
        let has = |prefix: &str, tensor: &String| names.contains(format!("{prefix}{tensor}").as_str());
        prefixes.filter(|prefix| self.present.iter().all(|tensor| has(prefix, tensor))).collect()
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
        for [name, like] in identity.iter().flat_map(OneOrMany::all) {
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
