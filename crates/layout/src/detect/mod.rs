//! [`detect`]: finds the family, layout and variant of a checkpoint from names and shapes; [`Identified`] is the
//! result.
//!
//! It chooses between the rules of `manifest` and applies them with `mapping`; `report` prints what it finds.

mod choose;
pub(crate) mod embedded;
pub(crate) mod hints;

use crate::detect::choose::Candidate;
use crate::detect::hints::Hints;
use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use crate::manifest::config::{DeclaredConfig, ResolvedConfig};
use crate::manifest::config_values::ConfigValues;
use crate::manifest::conflict::ConfigConflict;
use crate::manifest::evidence::TensorsByName;
use crate::manifest::family::{FamilyManifest, Layout, Variant};
use crate::manifest::shape::ExpectedTensor;
use crate::manifest::unsupported::UnsupportedModels;
use crate::mapping::assembly::{CanonicalSource, ExportedSource, MappedSource};
use crate::mapping::dequantized::{Dequantized, ScaleTensor};
use crate::mapping::load_report::{LoadReport, MissingTensor, ShapeMismatch, TensorOutcome, UncomputableTensor};
use crate::mapping::parameter_map::ParameterMap;
use crate::mapping::{Mapping, MappingContext};
use clearform_weights::{Checkpoint, TensorInfo, TensorSource, is_weight_dtype};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What comes with the tensors but is not a tensor.
#[derive(Debug, Clone, Copy)]
pub struct Sidecar<'a> {
    /// The content of config.json.
    pub config: Option<&'a Value>,
    /// Metadata of the tensor files.
    pub metadata: &'a BTreeMap<String, String>,
}

/// An identified checkpoint.
#[derive(Debug, Clone)]
pub struct Identified {
    /// Name of the family.
    pub family: String,
    /// The variant and how it is best sampled.
    pub variant: Variant,
    /// Name of the layout.
    pub layout: String,
    /// What every name of the layout begins with in this file.
    pub prefix: String,
    /// The config.json of diffusers, complete.
    pub config: Value,
    /// Where each of these was found.
    pub evidence: Vec<String>,
    /// What was assumed, and how to set it.
    pub notes: Vec<String>,
    conflicts: Vec<ConfigConflict>,
    scale_tensors: BTreeMap<String, ScaleTensor>,
    sizes: ConfigValues,
    manifest: Arc<FamilyManifest>,
    unsupported: Arc<UnsupportedModels>,
}

/// Identifies a checkpoint.
///
/// # Errors
/// [`LayoutError::Unsupported`] or [`LayoutError::Unknown`] if it is not a model of a supported family,
/// [`LayoutError::Ambiguous`] if a setting that changes the result cannot be determined.
pub fn detect(checkpoint: &Dequantized<Arc<Checkpoint>>, manifests: &Manifests, hints: &Hints) -> Result<Identified> {
    let files = checkpoint.source();
    let pipeline = hints.pipeline.clone().or_else(|| files.pipeline_class());
    let hints = Hints { pipeline, ..hints.clone() };
    detect_dequantized(checkpoint, Sidecar { config: files.config(), metadata: files.metadata() }, manifests, &hints)
}

/// Identifies any dequantized source.
pub(crate) fn detect_dequantized<S: TensorSource>(
    source: &Dequantized<S>,
    sidecar: Sidecar,
    manifests: &Manifests,
    hints: &Hints,
) -> Result<Identified> {
    let mut identified = detect_source(source, sidecar, manifests, hints)?;
    identified.scale_tensors = source.scale_tensors().clone();
    identified.notes.extend(source.note());
    Ok(identified)
}

/// Identifies a source of tensors that has no fp8 scales, such as one in memory.
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
    let declared =
        DeclaredConfig { config, metadata: sidecar.metadata, layout: None, variant: None, remedy: manifests.remedy };
    manifests.unsupported.refuse(&names)?;
    refuse_quantised(&infos, config)?;
    let mut candidate = choose::choose(&names, declared, manifests, hints)?;
    let tensors = tensors_without_sizes(&candidate, infos);
    let variant_settings = candidate.family.variant_settings(hints.variant.as_deref(), hints.pipeline.as_deref());
    let declared_with_layout =
        DeclaredConfig { layout: Some(&candidate.layout().settings), variant: variant_settings, ..declared };
    let resolved = ResolvedConfig::new(&candidate.family.settings, &tensors, declared_with_layout);
    let mut resolved = resolved.map_err(|error| candidate.explain(error, config))?;
    check_class(&candidate.family, &mut resolved, declared, hints);
    let variant = variant(&candidate.family, &mut resolved, hints)?;
    candidate.evidence.append(&mut resolved.evidence);
    candidate.notes.append(&mut resolved.notes);
    Ok(candidate.identified(resolved, variant, declared, &manifests.unsupported))
}

/// Refuses a model that config.json calls quantised and whose weights are. Their names may be those of the plain model.
fn refuse_quantised(infos: &[TensorInfo], config: Option<&Value>) -> Result<()> {
    let method = config.and_then(|config| config.get("quantization_config")?.get("quant_method")?.as_str());
    let is_packed = |info: &&TensorInfo| info.name.ends_with(".weight") && !is_weight_dtype(info.dtype);
    match (method, infos.iter().find(is_packed)) {
        (Some(method), Some(weight)) => Err(LayoutError::Unsupported {
            name: format!("a model quantised with {method:?}"),
            evidence: format!("quantization_config in config.json, and tensor {:?} in {:?}", weight.name, weight.dtype),
            remedy: "use the bf16 or fp16 file of the same model".to_owned(),
        }),
        _ => Ok(()),
    }
}

/// The tensors as far as they can be mapped before the sizes are known, to read the sizes from. Dropped tensors are
/// included: positions that are not used still show the image size.
fn tensors_without_sizes(candidate: &Candidate, infos: Vec<TensorInfo>) -> TensorsByName {
    let (inputs, _) = split_by_prefix(infos, &candidate.prefix);
    let context = MappingContext { family: &candidate.family, sizes: None };
    let mut mapping = Mapping::new(&candidate.layout().inward, &inputs, context);
    mapping.restore_ranks(&candidate.family);
    let tensors = mapping.dropped.into_iter().chain(mapping.tensors);
    tensors.map(|(name, tensor)| (name, tensor.info)).collect()
}

impl Identified {
    /// The source it was detected in, under canonical names. No tensor is read yet.
    pub fn canonical<S: TensorSource>(&self, source: S) -> CanonicalSource<S> {
        let (inputs, outside) = split_by_prefix(source.tensors(), &self.prefix);
        let context = MappingContext { family: &self.manifest, sizes: Some(&self.sizes) };
        let mut mapping = Mapping::new(&self.found_layout().inward, &inputs, context);
        mapping.restore_ranks(&self.manifest);
        for name in outside {
            mapping
                .outcomes
                .insert(name, TensorOutcome::Unmatched { reason: format!("it lacks the prefix {:?}", self.prefix) });
        }
        let mut load_report = LoadReport { contradictions: self.conflicts.clone(), ..LoadReport::default() };
        self.check_shapes(&mut mapping, &mut load_report);
        let used = inputs.iter().filter(|(_, info)| mapping.is_used(&info.name));
        load_report.uncomputable = used.filter_map(|(_, info)| UncomputableTensor::of(info)).collect();
        self.skip_components(&mut mapping.outcomes);
        self.report_scales(&mut mapping.outcomes);
        load_report.outcomes = mapping.outcomes;
        load_report.suggest_names(|| self.names());
        MappedSource::new(source, mapping.tensors, load_report)
    }

    /// `canonical`, the model under canonical names, under the names of another layout.
    ///
    /// # Errors
    /// [`LayoutError::NoSuch`] for a layout that the family does not have.
    pub fn to_layout<S: TensorSource>(&self, layout: &str, canonical: S) -> Result<ExportedSource<S>> {
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

    /// Names of the family's layouts.
    pub fn layouts(&self) -> impl Iterator<Item = &str> {
        self.manifest.layouts.iter().map(|layout| layout.name.as_str())
    }

    /// The same model after an adapter changed the shapes of some tensors: where the sizes in the config contradict the
    /// tensors of `source`, the tensors are right.
    ///
    /// # Errors
    /// As [`detect`].
    pub fn resized(&self, source: &dyn TensorSource, manifests: &Manifests) -> Result<Self> {
        let hints = Hints { family: Some(self.family.clone()), ..Hints::default() };
        let mut config = self.config.clone();
        let metadata = BTreeMap::new();
        let before = detect_source(source, Sidecar { config: Some(&config), metadata: &metadata }, manifests, &hints)?;
        if let Some(config) = config.as_object_mut() {
            before.conflicts.iter().for_each(|conflict| drop(config.remove(&conflict.key)));
        }
        detect_source(source, Sidecar { config: Some(&config), metadata: &metadata }, manifests, &hints)
    }

    /// Every canonical tensor that a model of these sizes has.
    pub fn expected(&self) -> Vec<ExpectedTensor> {
        self.manifest.expected(&self.sizes)
    }

    /// The name in the file of every tensor that the model has.
    fn names(&self) -> BTreeSet<String> {
        let context = MappingContext { family: &self.manifest, sizes: Some(&self.sizes) };
        let layout = self.found_layout();
        let name_in_file =
            |tensor: ExpectedTensor| layout.foreign_name(&tensor.name, &self.prefix, context).unwrap_or(tensor.name);
        self.expected().into_iter().map(name_in_file).collect()
    }

    /// The parameters of this model by their names in all layouts of the family.
    pub fn parameter_map(&self) -> ParameterMap {
        ParameterMap::new(&self.manifest, &self.sizes)
    }

    /// A size by its key in config.json, or one that config.json does not have, such as "width".
    pub fn size(&self, key: &str) -> Option<usize> {
        self.sizes.integer(key)
    }

    /// Numbers of blocks by their keys in config.json.
    pub fn depths(&self) -> BTreeMap<String, usize> {
        let depth = |key: &str| Some((key.to_owned(), self.sizes.integer(key)?));
        self.manifest.depths().filter_map(depth).collect()
    }

    /// The side in pixels of the square that one image token covers.
    pub fn pixels_per_token(&self) -> usize {
        self.manifest.pixels_per_token(&self.sizes)
    }

    /// The components that its pipeline needs besides the transformer, by the names of their folders.
    pub fn components(&self) -> &[String] {
        &self.manifest.components
    }

    /// Keys of its config.json that are set and no settings of the family. Keys of diffusers' own begin with an
    /// underscore.
    pub fn unknown_keys(&self) -> Vec<&str> {
        let is_setting = |key: &str| self.manifest.settings.iter().any(|setting| setting.key == key && !setting.hidden);
        let set = self.config.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
        set.map(|(key, _)| key.as_str()).filter(|key| !key.starts_with('_') && !is_setting(key)).collect()
    }

    /// Components that its pipeline may lack.
    pub fn optional_components(&self) -> &[String] {
        &self.manifest.optional_components
    }

    /// All components that its pipeline may have besides the transformer.
    pub fn all_components(&self) -> impl Iterator<Item = &String> {
        self.components().iter().chain(self.optional_components())
    }

    pub(crate) fn manifest(&self) -> &FamilyManifest {
        &self.manifest
    }

    pub(crate) fn unsupported(&self) -> &Arc<UnsupportedModels> {
        &self.unsupported
    }

    pub(crate) fn sizes(&self) -> &ConfigValues {
        &self.sizes
    }

    fn found_layout(&self) -> &Layout {
        let found = self.manifest.layouts.iter().find(|layout| layout.name == self.layout);
        // The name was taken from this manifest, so it is always found.
        found.unwrap_or(&self.manifest.layouts[0])
    }

    /// Reports missing and misshapen tensors, and removes tensors that a model of these sizes does not have.
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
                let reason = format!("it would become {name:?}, which a model of these sizes does not have");
                mapping.outcomes.insert(tensor.first_input().to_owned(), TensorOutcome::Unmatched { reason });
                false
            }
        });
    }

    /// Reports the tensors that [`Dequantized`] hides: a scale is used if its weight is.
    fn report_scales(&self, outcomes: &mut BTreeMap<String, TensorOutcome>) {
        for (name, scale) in &self.scale_tensors {
            let outcome = match scale {
                ScaleTensor::Unused(reason) => TensorOutcome::Skipped { reason: (*reason).to_owned() },
                ScaleTensor::ScaleOf(weight) => match outcomes.get(weight) {
                    Some(outcome) => outcome.clone(),
                    None => TensorOutcome::Unmatched { reason: format!("its weight {weight:?} is missing") },
                },
            };
            // If the source itself lists the tensor, it has not applied the scale, and the tensor's own outcome stands.
            outcomes.entry(name.clone()).or_insert(outcome);
        }
    }

    /// Tensors of components in the same file are skipped, not unmatched.
    fn skip_components(&self, outcomes: &mut BTreeMap<String, TensorOutcome>) {
        for (name, outcome) in outcomes {
            if let (TensorOutcome::Unmatched { .. }, Some(reason)) = (&outcome, self.unsupported.component(name)) {
                *outcome = TensorOutcome::Skipped { reason: reason.to_owned() };
            }
        }
    }
}

impl Candidate {
    /// Adds why a setting may be one that cannot be determined: missing signature tensors, or a config.json of another class.
    fn explain(&self, error: LayoutError, config: Option<&Value>) -> LayoutError {
        let LayoutError::Ambiguous { what, reason } = error else { return error };
        let class = config.and_then(|config| config.get("_class_name")?.as_str());
        let other_class = class.filter(|class| !self.family.is_class(class)).map(|class| {
            format!("config.json is for the class {class:?}, and the tensors are of {:?}", self.family.class)
        });
        let notes = self.notes.iter().cloned().chain(other_class).map(|note| format!("; {note}"));
        LayoutError::Ambiguous { what, reason: reason + &notes.collect::<String>() }
    }

    fn identified(
        self,
        resolved: ResolvedConfig,
        variant: Variant,
        declared: DeclaredConfig,
        unsupported: &Arc<UnsupportedModels>,
    ) -> Identified {
        Identified {
            family: self.family.name.clone(),
            variant,
            layout: self.layout().name.clone(),
            prefix: self.prefix,
            config: complete_config(&self.family, resolved.config, declared.config),
            evidence: self.evidence,
            notes: self.notes,
            conflicts: resolved.conflicts,
            scale_tensors: BTreeMap::new(),
            sizes: resolved.sizes,
            manifest: self.family,
            unsupported: unsupported.clone(),
        }
    }
}

/// The tensors with `prefix`, each with its name without it, and the names of the others.
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

/// The declared config.json with the resolved settings in it.
fn complete_config(family: &FamilyManifest, found: Map<String, Value>, declared: Option<&Value>) -> Value {
    // Configs of transformers have a list, "architectures", in place of diffusers' "_class_name".
    let class = (!found.contains_key("architectures")).then(|| Value::from(family.class.as_str()));
    let mut config: Map<_, _> = class.into_iter().map(|class| ("_class_name".to_owned(), class)).collect();
    let declared = declared.and_then(Value::as_object).into_iter().flatten();
    config.extend(declared.filter(|(key, _)| *key != "_class_name").map(|(key, value)| (key.clone(), value.clone())));
    config.extend(found);
    Value::Object(config)
}

/// A class of another family in config.json is a conflict, unless the user named the family.
fn check_class(family: &FamilyManifest, resolved: &mut ResolvedConfig, declared: DeclaredConfig, hints: &Hints) {
    let Some(class) = declared.config.and_then(|config| config.get("_class_name")) else { return };
    if class.as_str().is_some_and(|class| family.is_class(class)) {
        return;
    }
    match &hints.family {
        Some(family) => resolved.notes.push(format!("config.json is for {class}; using {family}, as requested")),
        None => resolved.conflicts.push(ConfigConflict {
            key: "_class_name".to_owned(),
            declared: class.clone(),
            origin: "config.json".to_owned(),
            found: family.class.clone().into(),
            witness: "the tensors".to_owned(),
        }),
    }
}

fn variant(family: &FamilyManifest, resolved: &mut ResolvedConfig, hints: &Hints) -> Result<Variant> {
    let mut fitting = family.variants(&resolved.sizes);
    if let Some(name) = &hints.variant {
        let choices = family.variant_names();
        if !fitting.iter().any(|variant| variant.name == *name) {
            resolved.notes.push(format!(
                "the tensors do not fit the requested variant {name:?}; its sampling defaults are used all the same"
            ));
        }
        return family.variant(name).ok_or(LayoutError::NoSuch { kind: "variant", name: name.clone(), choices });
    }
    let is_in =
        |variant: &Variant| hints.pipeline.as_ref().is_some_and(|class| family.is_in_pipeline(&variant.name, class));
    if fitting.iter().any(is_in) {
        fitting.retain(is_in);
    }
    if let [first, second, ..] = &fitting[..] {
        let names: Vec<&str> = fitting.iter().map(|variant| variant.name.as_str()).collect();
        resolved.notes.push(format!(
            "the variants {} have the same tensors; using {} (choose another with --variant {})",
            names.join(", "),
            first.name,
            second.name
        ));
    }
    let custom = || family.variant("custom").ok_or_else(|| LayoutError::Unknown { nearest: Vec::new() });
    fitting.into_iter().next().map_or_else(custom, Ok)
}
