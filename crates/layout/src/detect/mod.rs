//! [`detect`]: which family, layout and variant a checkpoint is, from names and shapes; [`Identified`]: the answer.

use crate::detect::choose::Candidate;
use crate::detect::hints::Hints;
use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use crate::manifest::config::{ConfigConflict, DeclaredConfig, ResolvedConfig};
use crate::manifest::config_values::ConfigValues;
use crate::manifest::family::{FamilyManifest, Layout, Variant};
use crate::manifest::shape::ExpectedTensor;
use crate::manifest::unsupported::UnsupportedModels;
use crate::mapping::assembly::{CanonicalSource, ExportedSource, MappedSource};
use crate::mapping::dequantized::{Dequantized, ScaleTensor};
use crate::mapping::load_report::{LoadReport, MissingTensor, ShapeMismatch, TensorOutcome};
use crate::mapping::parameter_map::ParameterMap;
use crate::mapping::{Mapping, MappingContext};
use clearform_weights::{Checkpoint, TensorInfo, TensorSource};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

mod choose;
pub(crate) mod embedded;
pub(crate) mod hints;

/// What lies beside the tensors.
#[derive(Debug, Clone, Copy)]
pub struct Sidecar<'a> {
    /// The content of config.json.
    pub config: Option<&'a Value>,
    /// Metadata of the tensor files.
    pub metadata: &'a BTreeMap<String, String>,
}

/// What a checkpoint is.
#[derive(Debug, Clone)]
pub struct Identified {
    /// Name of the family.
    pub family: String,
    /// The variant and how it is best sampled.
    pub variant: Variant,
    /// Name of the layout.
    pub layout: String,
    /// What stands before every name of the layout.
    pub prefix: String,
    /// The diffusers config.json, complete.
    pub config: Value,
    /// By what all this was found.
    pub evidence: Vec<String>,
    /// What was taken for granted, and how to set it.
    pub notes: Vec<String>,
    contradictions: Vec<ConfigConflict>,
    companions: BTreeMap<String, ScaleTensor>,
    sizes: ConfigValues,
    manifest: Arc<FamilyManifest>,
    known: Arc<UnsupportedModels>,
}

/// Identifies a checkpoint.
///
/// # Errors
/// [`LayoutError::Unsupported`] or [`LayoutError::Unknown`] if it is no model of a supported family,
/// [`LayoutError::Ambiguous`] if something that changes arithmetic stays open.
pub fn detect(checkpoint: &Dequantized<Checkpoint>, manifests: &Manifests, hints: &Hints) -> Result<Identified> {
    let files = checkpoint.source();
    detect_unscaled(checkpoint, Sidecar { config: files.config(), metadata: files.metadata() }, manifests, hints)
}

/// The same of any source.
pub(crate) fn detect_unscaled<S: TensorSource>(
    source: &Dequantized<S>,
    sidecar: Sidecar,
    manifests: &Manifests,
    hints: &Hints,
) -> Result<Identified> {
    let mut identified = detect_source(source, sidecar, manifests, hints)?;
    identified.companions = source.companions().clone();
    identified.notes.extend(source.note());
    Ok(identified)
}

/// Identifies any source of tensors.
///
/// # Errors
/// As [`detect`].
pub fn detect_source(
    source: &dyn TensorSource,
    sidecar: Sidecar,
    manifests: &Manifests,
    hints: &Hints,
) -> Result<Identified> {
    let infos = source.tensors();
    let names: BTreeSet<&str> = infos.iter().map(|info| info.name.as_str()).collect();
    let config = hints.config.as_ref().or(sidecar.config);
    let declared = DeclaredConfig { config, metadata: sidecar.metadata, layout: None, remedy: manifests.remedy };
    let mut candidate = choose::choose(&names, declared, manifests, hints)?;
    let context = MappingContext { family: &candidate.family, sizes: None };
    let (inputs, _) = split_by_prefix(infos, &candidate.prefix);
    let mapping = Mapping::new(&candidate.layout().inward, &inputs, context);
    let shown = mapping.dropped.into_iter().chain(mapping.tensors);
    let shown = shown.map(|(name, tensor)| (name, tensor.info)).collect();
    let of_layout = DeclaredConfig { layout: Some(&candidate.layout().settings), ..declared };
    let settled = ResolvedConfig::new(&candidate.family.settings, &shown, of_layout);
    let mut settled = settled.map_err(|error| candidate.explain(error))?;
    check_class(&candidate.family, &mut settled, declared, hints);
    let variant = variant(&candidate.family, &mut settled, hints)?;
    candidate.evidence.append(&mut settled.evidence);
    candidate.notes.append(&mut settled.notes);
    Ok(candidate.identified(settled, variant, declared, &manifests.known))
}

impl Identified {
    /// `source`, which it was detected in, under canonical names. Nothing is read yet.
    pub fn canonical<S: TensorSource>(&self, source: S) -> CanonicalSource<S> {
        let (inputs, outside) = split_by_prefix(source.tensors(), &self.prefix);
        let context = MappingContext { family: &self.manifest, sizes: Some(&self.sizes) };
        let mut mapping = Mapping::new(&self.found_layout().inward, &inputs, context);
        for name in outside {
            mapping
                .outcomes
                .insert(name, TensorOutcome::Unmatched { reason: format!("it lacks the prefix {:?}", self.prefix) });
        }
        let mut load_report = LoadReport { contradictions: self.contradictions.clone(), ..LoadReport::default() };
        self.check_shapes(&mut mapping, &mut load_report);
        self.skip_components(&mut mapping.outcomes);
        self.report_scales(&mut mapping.outcomes);
        load_report.outcomes = mapping.outcomes;
        load_report.suggest_names(|| self.names());
        MappedSource::new(source, mapping.tensors, load_report)
    }

    /// `canonical` under the names of another layout, those of a portable model for instance.
    ///
    /// # Errors
    /// [`LayoutError::NoSuch`] for a layout that the family does not have.
    pub fn foreign<S: TensorSource>(&self, layout: &str, canonical: S) -> Result<ExportedSource<S>> {
        let layouts = &self.manifest.layouts;
        let layout = layouts.iter().find(|known| known.name == layout).ok_or_else(|| LayoutError::NoSuch {
            kind: "layout",
            name: layout.to_owned(),
            choices: layouts.iter().map(|layout| layout.name.clone()).collect(),
        })?;
        let context = MappingContext { family: &self.manifest, sizes: Some(&self.sizes) };
        let inputs: Vec<_> = canonical.tensors().into_iter().map(|info| (info.name.clone(), info)).collect();
        let Mapping { tensors, outcomes, .. } = Mapping::new(&layout.outward, &inputs, context);
        let prefix = layout.prefixes.first().map_or("", String::as_str);
        let tensors = tensors.into_values().map(|tensor| tensor.with_prefix(prefix)).collect();
        Ok(MappedSource::new(canonical, tensors, LoadReport { outcomes, ..LoadReport::default() }))
    }

    /// Names of the layouts that the family has.
    pub fn layouts(&self) -> impl Iterator<Item = &str> {
        self.manifest.layouts.iter().map(|layout| layout.name.as_str())
    }

    /// The same model with tensors of other extents, as an adapter left them: where they contradict the sizes that were,
    /// they are right.
    ///
    /// # Errors
    /// As [`detect`].
    pub fn resized(&self, source: &dyn TensorSource, manifests: &Manifests) -> Result<Self> {
        let hints = Hints { family: Some(self.family.clone()), ..Hints::default() };
        let (mut config, metadata) = (self.config.clone(), BTreeMap::new());
        let once = detect_source(source, Sidecar { config: Some(&config), metadata: &metadata }, manifests, &hints)?;
        if let Some(config) = config.as_object_mut() {
            once.contradictions.iter().for_each(|contradiction| drop(config.remove(&contradiction.key)));
        }
        detect_source(source, Sidecar { config: Some(&config), metadata: &metadata }, manifests, &hints)
    }

    /// Every canonical tensor a model of these sizes has.
    pub fn expected(&self) -> Vec<ExpectedTensor> {
        self.manifest.expected(&self.sizes)
    }

    /// The name of every tensor in the layout that was found.
    fn names(&self) -> BTreeSet<String> {
        let context = MappingContext { family: &self.manifest, sizes: Some(&self.sizes) };
        let layout = self.found_layout();
        let name =
            |tensor: ExpectedTensor| layout.foreign_name(&tensor.name, &self.prefix, context).unwrap_or(tensor.name);
        self.expected().into_iter().map(name).collect()
    }

    /// Where each parameter of this model lies, under its names in all layouts of the family.
    pub fn parameter_map(&self) -> ParameterMap {
        ParameterMap::new(&self.manifest, &self.sizes)
    }

    /// A size by its key in config.json, or a hidden one such as "width".
    pub fn size(&self, key: &str) -> Option<usize> {
        self.sizes.number(key)
    }

    /// Numbers of blocks by their keys in config.json.
    pub fn depths(&self) -> BTreeMap<String, usize> {
        let depth = |key: &str| Some((key.to_owned(), self.sizes.number(key)?));
        self.manifest.depths().filter_map(depth).collect()
    }

    /// Pixels along one side of the square that an image token stands for.
    pub fn pixels_per_token(&self) -> usize {
        self.manifest.pixels_per_token(&self.sizes)
    }

    /// The parts of a pipeline beside its transformer that it cannot do without, named as their folders.
    pub fn components(&self) -> &[String] {
        &self.manifest.components
    }

    /// Parts of a pipeline that it may lack.
    pub fn optional_components(&self) -> &[String] {
        &self.manifest.optional_components
    }

    pub(crate) fn manifest(&self) -> &FamilyManifest {
        &self.manifest
    }

    pub(crate) fn known(&self) -> &Arc<UnsupportedModels> {
        &self.known
    }

    pub(crate) fn sizes(&self) -> &ConfigValues {
        &self.sizes
    }

    fn found_layout(&self) -> &Layout {
        let found = self.manifest.layouts.iter().find(|layout| layout.name == self.layout);
        // The name was taken from this very manifest.
        found.unwrap_or(&self.manifest.layouts[0])
    }

    /// Compares with what the sizes ask for; takes out what they do not.
    fn check_shapes(&self, mapping: &mut Mapping, load_report: &mut LoadReport) {
        let expected: BTreeMap<String, ExpectedTensor> =
            self.expected().into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        let context = MappingContext { family: &self.manifest, sizes: Some(&self.sizes) };
        for tensor in expected.values().filter(|tensor| !tensor.optional && !mapping.tensors.contains_key(&tensor.name))
        {
            let foreign = self.found_layout().foreign_name(&tensor.name, &self.prefix, context);
            load_report.missing.push(MissingTensor { name: tensor.name.clone(), foreign });
        }
        mapping.tensors.retain(|name, tensor| match expected.get(name) {
            Some(expected) => {
                let found = tensor.info.shape.clone();
                if !expected.fits(&found) {
                    let from = tensor.first_input().to_owned();
                    load_report.misshapen.push(ShapeMismatch { expected: expected.clone(), found, from });
                }
                true
            }
            None => {
                let reason = format!("it would give {name:?}, which a model of these sizes does not have");
                mapping.outcomes.insert(tensor.first_input().to_owned(), TensorOutcome::Unmatched { reason });
                false
            }
        });
    }

    /// A scale is used where its weight is.
    fn report_scales(&self, outcomes: &mut BTreeMap<String, TensorOutcome>) {
        for (name, companion) in &self.companions {
            let outcome = match companion {
                ScaleTensor::Spare(reason) => TensorOutcome::Skipped { reason: (*reason).to_owned() },
                ScaleTensor::ScaleOf(weight) => match outcomes.get(weight) {
                    Some(outcome) => outcome.clone(),
                    None => TensorOutcome::Unmatched { reason: format!("its weight {weight:?} is missing") },
                },
            };
            // A source that shows the tensor has not applied it.
            outcomes.entry(name.clone()).or_insert(outcome);
        }
    }

    fn skip_components(&self, outcomes: &mut BTreeMap<String, TensorOutcome>) {
        for (name, outcome) in outcomes {
            if let (TensorOutcome::Unmatched { .. }, Some(reason)) = (&outcome, self.known.component(name)) {
                *outcome = TensorOutcome::Skipped { reason: reason.to_owned() };
            }
        }
    }
}

impl Candidate {
    /// What stays open may do so for want of a tensor of the signature.
    fn explain(&self, error: LayoutError) -> LayoutError {
        match error {
            LayoutError::Ambiguous { what, reason } => {
                let notes = self.notes.iter().map(|note| format!("; {note}"));
                LayoutError::Ambiguous { what, reason: reason + &notes.collect::<String>() }
            }
            other => other,
        }
    }

    fn identified(
        self,
        settled: ResolvedConfig,
        variant: Variant,
        declared: DeclaredConfig,
        known: &Arc<UnsupportedModels>,
    ) -> Identified {
        Identified {
            family: self.family.name.clone(),
            variant,
            layout: self.layout().name.clone(),
            prefix: self.prefix,
            config: config(&self.family, settled.config, declared.config),
            evidence: self.evidence,
            notes: self.notes,
            contradictions: settled.contradictions,
            companions: BTreeMap::new(),
            sizes: settled.sizes,
            manifest: self.family,
            known: known.clone(),
        }
    }
}

/// Tensors under `prefix`, with the names that rules know, and the names of the others.
fn split_by_prefix(infos: Vec<TensorInfo>, prefix: &str) -> (Vec<(String, TensorInfo)>, Vec<String>) {
    let mut inside = Vec::new();
    let mut outside = Vec::new();
    for info in infos {
        match info.name.strip_prefix(prefix) {
            Some(name) => inside.push((name.to_owned(), info)),
            None => outside.push(info.name),
        }
    }
    (inside, outside)
}

/// What config.json says, completed by what was found.
fn config(family: &FamilyManifest, found: Map<String, Value>, declared: Option<&Value>) -> Value {
    // The library transformers has a list of classes in place of diffusers' one.
    let class = (!found.contains_key("architectures")).then(|| Value::from(family.class.as_str()));
    let mut config: Map<_, _> = class.into_iter().map(|class| ("_class_name".to_owned(), class)).collect();
    let declared = declared.and_then(Value::as_object).into_iter().flatten();
    config.extend(declared.filter(|(key, _)| *key != "_class_name").map(|(key, value)| (key.clone(), value.clone())));
    config.extend(found);
    Value::Object(config)
}

/// Another class in config.json is a contradiction, unless the family was asked for.
fn check_class(family: &FamilyManifest, settled: &mut ResolvedConfig, declared: DeclaredConfig, hints: &Hints) {
    let Some(class) = declared.config.and_then(|config| config.get("_class_name")) else { return };
    if class.as_str().is_some_and(|class| family.is_class(class)) {
        return;
    }
    let (declared, origin) = (class.clone(), "config.json".to_owned());
    let (found, witness) = (family.class.clone().into(), "the tensors".to_owned());
    match &hints.family {
        Some(asked) => settled.notes.push(format!("config.json is one of {class}; {asked} is taken, as asked for")),
        None => {
            let key = "_class_name".to_owned();
            settled.contradictions.push(ConfigConflict { key, declared, origin, found, witness });
        }
    }
}

fn variant(family: &FamilyManifest, settled: &mut ResolvedConfig, hints: &Hints) -> Result<Variant> {
    let fitting = family.variants(&settled.sizes);
    if let Some(name) = &hints.variant {
        let choices = family.variant_names();
        if !fitting.iter().any(|variant| variant.name == *name) {
            settled.notes.push(format!("the tensors are not those of the variant {name:?}, which was asked for"));
        }
        return family.variant(name).ok_or(LayoutError::NoSuch { kind: "variant", name: name.clone(), choices });
    }
    if let [first, second, ..] = &fitting[..] {
        let names: Vec<&str> = fitting.iter().map(|variant| variant.name.as_str()).collect();
        settled.notes.push(format!(
            "the variants {} have the same tensors; {} is taken (--variant {} sets another)",
            names.join(", "),
            first.name,
            second.name
        ));
    }
    let custom = || family.variant("custom").ok_or_else(|| LayoutError::Unknown { near: Vec::new() });
    fitting.into_iter().next().map_or_else(custom, Ok)
}
