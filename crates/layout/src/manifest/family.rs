//! [`FamilyManifest`]: one family's settings, tensors, layouts, variants and components, read from its manifest.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::one_or_many::OneOrMany;
use crate::manifest::pattern::Pattern;
use crate::manifest::rule::{MappingRule, MappingStep, RawMappingRule};
use crate::manifest::setting::Setting;
use crate::manifest::shape::{AppliedPer, AttendsTo, ExpectedTensor, SizeExpr, TensorRule};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The side of an image token where a manifest does not state it: an 8-fold VAE and patches of 2.
const USUAL_PIXELS_PER_TOKEN: usize = 16;

/// Sampling defaults of a variant.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SamplingDefaults {
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Text tokens that the transformer attends to; 0 if the family takes no text.
    pub text_tokens: usize,
    /// Evaluations of the transformer per step: two with classifier-free guidance.
    pub evaluations: usize,
}

/// A published model of the family with its own sampling defaults, such as FLUX.1 schnell.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Variant {
    /// Its name in the manifest; "custom" if none fits.
    pub name: String,
    /// Its sampling defaults.
    pub defaults: SamplingDefaults,
}

/// A manifest file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawFamily {
    pub edition: u32,
    pub family: String,
    /// A family to start from: everything but its class, aliases and variants is copied, and what this manifest states
    /// replaces the copy.
    pub like: Option<String>,
    class: Option<String>,
    #[serde(default)]
    aliases: Vec<String>,
    /// The side of an image token in pixels: a number or a product of settings.
    pixels_per_token: Option<SizeExpr>,
    /// The side in pixels of the images it was trained on, if a setting states it.
    trained_side: Option<SizeExpr>,
    /// The side in pixels of the largest image it can generate, if something limits it.
    largest_side: Option<SizeExpr>,
    components: Option<Vec<String>>,
    optional_components: Option<Vec<String>>,
    #[serde(default)]
    defaults: RawSamplingDefaults,
    #[serde(default)]
    settings: Vec<Setting>,
    #[serde(default)]
    tensors: Vec<TensorRule>,
    #[serde(default)]
    layout: Vec<RawLayout>,
    #[serde(default)]
    variant: Vec<RawVariant>,
    /// Earlier versions called it `part`, and users' manifests still do.
    #[serde(default, alias = "part")]
    component: Vec<RawComponent>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLayout {
    name: String,
    /// A layout with the same rules and signature, to which this one adds prefixes.
    like: Option<String>,
    #[serde(default)]
    present: Vec<String>,
    #[serde(default)]
    absent: Vec<String>,
    prefixes: Vec<String>,
    rules: Option<Vec<RawMappingRule>>,
    /// For a layout without rules: canonical names by the foreign names that differ from them.
    #[serde(default)]
    rename: BTreeMap<String, String>,
    /// Names that adapters have for tensors of this layout, with those that the layout has.
    #[serde(default)]
    adapter_names: BTreeMap<String, String>,
    /// Further names that are dropped, and why.
    #[serde(default)]
    drop: BTreeMap<String, String>,
    /// Settings that every file of this layout has, unless config.json declares others.
    #[serde(default)]
    settings: Map<String, Value>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVariant {
    name: String,
    #[serde(rename = "where")]
    conditions: Map<String, Value>,
    #[serde(default)]
    defaults: RawSamplingDefaults,
    /// Settings that no tensor shows, where the user or the pipeline says that it is this variant.
    #[serde(default)]
    settings: Map<String, Value>,
    /// The class of its pipeline in diffusers, where that tells it from another variant with the same tensors.
    pipeline: Option<String>,
    /// Its config.json, with hidden settings, as far as its shapes depend on it.
    config: Option<Value>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSamplingDefaults {
    steps: Option<usize>,
    guidance: Option<f64>,
    text_tokens: Option<usize>,
    evaluations: Option<usize>,
}

/// A naming of the family's tensors on disk.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub name: String,
    /// Its signature: patterns of names that a file of this layout has.
    pub present: Vec<String>,
    /// Patterns of names that it does not have, but a similar model.
    pub absent: Vec<String>,
    /// What names may begin with.
    pub prefixes: Vec<String>,
    /// From this layout to canonical names.
    pub inward: Vec<MappingStep>,
    /// From canonical names to this layout.
    pub outward: Vec<MappingStep>,
    /// (name in adapters, name in this layout).
    pub adapter_names: Vec<(Pattern, Pattern)>,
    pub settings: Map<String, Value>,
}

/// A family's rules.
#[derive(Debug, Clone, Default)]
pub(crate) struct FamilyManifest {
    pub name: String,
    pub class: String,
    pub aliases: Vec<String>,
    pub components: Vec<String>,
    pub optional_components: Vec<String>,
    pub settings: Vec<Setting>,
    pub layouts: Vec<Layout>,
    pixels_per_token: Option<SizeExpr>,
    trained_side: Option<SizeExpr>,
    largest_side: Option<SizeExpr>,
    defaults: RawSamplingDefaults,
    tensors: Vec<TensorRule>,
    variants: Vec<RawVariant>,
    /// Components that may be in the transformer's file.
    pub component_rules: Vec<Arc<ComponentRule>>,
}

/// A component as the manifest of a family describes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawComponent {
    pub name: String,
    /// The manifest in `manifests/components/` with its rules.
    pub kind: String,
    pub prefixes: Vec<String>,
    /// Settings that none of its tensors show, unless config.json declares others.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// More such settings, by variant of the family.
    #[serde(default)]
    pub variants: BTreeMap<String, Map<String, Value>>,
    /// Tensors that the family does not use, and why.
    #[serde(default)]
    pub unused: BTreeMap<String, String>,
    /// A tensor that is the identity matrix in this family, and a tensor with as many rows: a pair for each layout.
    pub identity: Option<OneOrMany<[String; 2]>>,
    /// What users call a file that holds the component alone, as stable-diffusion.cpp's options do.
    pub file: Option<String>,
}

/// A component in a family's files, with the rules of its kind.
#[derive(Debug)]
pub(crate) struct ComponentRule {
    pub raw: RawComponent,
    pub manifest: Arc<FamilyManifest>,
}

impl FamilyManifest {
    /// A new family, starting from the family `like`. `kinds` are the rules of components. The error names what is
    /// wrong.
    pub fn new(raw: RawFamily, like: Option<&Self>, kinds: &[Arc<Self>]) -> Result<Self, String> {
        let class = raw.class.clone().ok_or("a new family needs a class")?;
        if like.is_some() && !raw.tensors.is_empty() {
            return Err("a family with `like` must not list tensors".to_owned());
        }
        let mut family = like.cloned().unwrap_or_default();
        family.name = raw.family.clone();
        family.class = class;
        family.aliases = raw.aliases.clone();
        family.variants.clear();
        family.tensors.extend(raw.tensors.iter().cloned());
        family.pixels_per_token = raw.pixels_per_token.clone().or(family.pixels_per_token);
        family.trained_side = raw.trained_side.clone().or(family.trained_side);
        family.largest_side = raw.largest_side.clone().or(family.largest_side);
        family.components = raw.components.clone().unwrap_or(family.components);
        family.optional_components = raw.optional_components.clone().unwrap_or(family.optional_components);
        family.defaults = raw.defaults.or(family.defaults);
        raw.settings.iter().for_each(|setting| family.set(setting.clone()));
        family.extend(raw, kinds)?;
        Ok(family)
    }

    fn set(&mut self, setting: Setting) {
        match self.settings.iter_mut().find(|known| known.key == setting.key) {
            Some(known) => *known = setting,
            None => self.settings.push(setting),
        }
    }

    /// `only` and `except` must refer to settings that list block numbers.
    fn check_blocks(&self) -> Result<(), String> {
        let lists_blocks = |key: &str| self.settings.iter().any(|setting| setting.key == key && setting.lists_blocks());
        let steps = self.layouts.iter().flat_map(|layout| &layout.inward).map(|step| step.blocks.clone());
        let filters = self.tensors.iter().map(TensorRule::blocks).chain(steps);
        let mut keys = filters.flat_map(|blocks| blocks.keys().map(str::to_owned).collect::<Vec<_>>());
        let unknown = keys.find(|key| !lists_blocks(key));
        match unknown {
            None => Ok(()),
            Some(key) => Err(format!("{key:?} is neither \"last\" nor a setting that lists block numbers")),
        }
    }

    /// Puts the layouts, variants and components of `raw` before its own, so that a user's take precedence. `kinds` are
    /// the rules of components.
    pub fn extend(&mut self, raw: RawFamily, kinds: &[Arc<Self>]) -> Result<(), String> {
        let rules = raw.component.into_iter().map(|component| ComponentRule::new(component, kinds).map(Arc::new));
        self.component_rules.splice(0..0, rules.collect::<Result<Vec<_>, _>>()?);
        for (index, layout) in raw.layout.into_iter().enumerate() {
            let layout = self.layout(layout)?;
            self.layouts.insert(index, layout);
        }
        self.variants.splice(0..0, raw.variant);
        self.check_blocks()
    }

    /// Whether `class` is its class or an alias of it.
    pub fn is_class(&self, class: &str) -> bool {
        self.class == class || self.aliases.iter().any(|alias| alias == class)
    }

    /// The side in pixels of the square that one image token covers.
    pub fn pixels_per_token(&self, sizes: &ConfigValues) -> usize {
        let side = self.pixels_per_token.as_ref().and_then(|side| side.value(sizes));
        side.unwrap_or(USUAL_PIXELS_PER_TOKEN).max(1)
    }

    /// The side in pixels of the images that a model of `sizes` was trained on, if it is known.
    pub fn trained_side(&self, sizes: &ConfigValues) -> Option<usize> {
        self.trained_side.as_ref()?.value(sizes)
    }

    /// The side in pixels of the largest image that a model of `sizes` can generate, if there is a limit.
    pub fn largest_side(&self, sizes: &ConfigValues) -> Option<usize> {
        self.largest_side.as_ref()?.value(sizes)
    }

    /// Every tensor that a model of `sizes` has, what it is applied to, and what the tokens of a query attend to.
    pub fn weights(
        &self,
        sizes: &ConfigValues,
    ) -> impl Iterator<Item = (ExpectedTensor, Option<AppliedPer>, Option<AttendsTo>)> {
        self.tensors.iter().flat_map(|rule| {
            let tensors = rule.expand(sizes, self.blocks_of(&rule.name, sizes));
            tensors.into_iter().map(|tensor| (tensor, rule.per, rule.attends))
        })
    }

    /// Every tensor that a model of `sizes` has.
    pub fn expected(&self, sizes: &ConfigValues) -> Vec<ExpectedTensor> {
        self.tensors.iter().flat_map(|rule| rule.expand(sizes, self.blocks_of(&rule.name, sizes))).collect()
    }

    /// The shape that the canonical tensor `name` must have, if it is known.
    pub fn expected_shape(&self, name: &str, sizes: &ConfigValues) -> Option<Vec<usize>> {
        let expected = self.expected(sizes).into_iter().find(|expected| expected.name == name)?;
        expected.shape.into_iter().collect()
    }

    /// The number of dimensions that the canonical tensor `name` has in a model of any size.
    pub fn rank_of(&self, name: &str) -> Option<usize> {
        self.tensors.iter().find_map(|rule| rule.rank_of(name))
    }

    /// Keys of the settings that count blocks.
    pub fn depths(&self) -> impl Iterator<Item = &str> {
        self.settings.iter().filter(|setting| setting.blocks.is_some()).map(|setting| setting.key.as_str())
    }

    /// The variants whose conditions `sizes` satisfy, in order.
    pub fn variants(&self, sizes: &ConfigValues) -> Vec<Variant> {
        let fitting = self.variants.iter().filter(|variant| sizes.satisfies(&variant.conditions));
        fitting.map(|variant| self.with_defaults(&variant.name, variant.defaults)).collect()
    }

    /// Settings of the variant called `name`, or of the only one in pipelines of the class `pipeline`.
    pub fn variant_settings(&self, name: Option<&str>, pipeline: Option<&str>) -> Option<&Map<String, Value>> {
        let is_meant = |variant: &&RawVariant| match name {
            Some(name) => variant.name == name,
            None => pipeline.is_some() && variant.pipeline.as_deref() == pipeline,
        };
        self.variants.iter().find(is_meant).map(|variant| &variant.settings)
    }

    /// Whether the variant called `name` is that of pipelines of the class `pipeline`.
    pub fn is_in_pipeline(&self, name: &str, pipeline: &str) -> bool {
        let is_in = |variant: &RawVariant| variant.name == name && variant.pipeline.as_deref() == Some(pipeline);
        self.variants.iter().any(is_in)
    }

    /// The variant called `name`, whatever the sizes.
    pub fn variant(&self, name: &str) -> Option<Variant> {
        let custom = (name == "custom").then(|| self.with_defaults(name, RawSamplingDefaults::default()));
        let named = self.variants.iter().find(|variant| variant.name == name);
        named.map(|variant| self.with_defaults(name, variant.defaults)).or(custom)
    }

    /// The variants whose config.json is known, with it.
    pub fn published(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.variants.iter().filter_map(|variant| Some((variant.name.as_str(), variant.config.as_ref()?)))
    }

    /// Names of all variants.
    pub fn variant_names(&self) -> Vec<String> {
        self.variants.iter().map(|variant| variant.name.clone()).chain(["custom".to_owned()]).collect()
    }

    /// A variant with `defaults`, completed by those of the family; if neither has one, 28 steps without guidance or
    /// text.
    fn with_defaults(&self, name: &str, defaults: RawSamplingDefaults) -> Variant {
        let RawSamplingDefaults { steps, guidance, text_tokens, evaluations } = defaults.or(self.defaults);
        let defaults = SamplingDefaults {
            steps: steps.unwrap_or(28),
            guidance: guidance.unwrap_or(1.0),
            text_tokens: text_tokens.unwrap_or(0),
            evaluations: evaluations.unwrap_or(1),
        };
        Variant { name: name.to_owned(), defaults }
    }

    /// How many blocks there are of the kind that the pattern `name` is in.
    pub fn blocks_of(&self, name: &str, sizes: &ConfigValues) -> usize {
        let is_prefix = |prefix: &String| name.starts_with(prefix);
        let counts =
            |setting: &&Setting| setting.blocks.as_ref().is_some_and(|blocks| blocks.all().iter().any(is_prefix));
        self.settings.iter().find(counts).and_then(|setting| sizes.integer(&setting.key)).unwrap_or(0)
    }

    fn layout(&self, raw: RawLayout) -> Result<Layout, String> {
        let mut rules = match (raw.rules, &raw.like) {
            (None, Some(like)) => {
                let base = self.layouts.iter().find(|layout| layout.name == *like);
                let base = base.ok_or_else(|| format!("layout {:?} is like {like:?}, which is unknown", raw.name))?;
                return Ok(Layout { name: raw.name, prefixes: raw.prefixes, ..base.clone() });
            }
            (Some(rules), None) => rules.into_iter().map(MappingRule::new).collect::<Result<Vec<_>, _>>()?,
            (None, None) => self.tensors.iter().map(|tensor| plain_rule(&tensor.name, &raw.rename)).collect::<Vec<_>>(),
            (Some(_), Some(_)) => return Err(format!("layout {:?} has both rules and like", raw.name)),
        };
        rules.extend(raw.drop.into_iter().map(|(name, reason)| MappingRule::drop(vec![Pattern::new(&name)], reason)));
        let adapter_names = raw.adapter_names.iter().map(|(alias, name)| (Pattern::new(alias), Pattern::new(name)));
        let (inward, outward): (Vec<_>, Vec<_>) = rules.into_iter().map(|rule| (rule.inward, rule.outward)).unzip();
        Ok(Layout {
            name: raw.name,
            present: raw.present,
            absent: raw.absent,
            prefixes: raw.prefixes,
            settings: raw.settings,
            inward,
            outward: outward.into_iter().flatten().collect(),
            adapter_names: adapter_names.collect(),
        })
    }
}

/// The rule for the canonical tensor `name` in a layout without rules, which may rename it.
fn plain_rule(name: &str, renamed: &BTreeMap<String, String>) -> MappingRule {
    let foreign = renamed.iter().find(|(_, canonical)| *canonical == name).map_or(name, |(foreign, _)| foreign);
    MappingRule::same(foreign, name)
}

impl ComponentRule {
    /// Finds the rules of the component's kind among `kinds`; the error names what is wrong.
    pub fn new(raw: RawComponent, kinds: &[Arc<FamilyManifest>]) -> Result<Self, String> {
        let manifest = kinds.iter().find(|kind| kind.name == raw.kind).cloned().ok_or_else(|| {
            let known: Vec<&str> = kinds.iter().map(|kind| kind.name.as_str()).collect();
            format!("component {:?} is of the unknown kind {:?}; use one of {known:?}", raw.name, raw.kind)
        })?;
        Ok(Self { raw, manifest })
    }
}

impl RawSamplingDefaults {
    fn or(self, others: Self) -> Self {
        Self {
            steps: self.steps.or(others.steps),
            guidance: self.guidance.or(others.guidance),
            text_tokens: self.text_tokens.or(others.text_tokens),
            evaluations: self.evaluations.or(others.evaluations),
        }
    }
}
