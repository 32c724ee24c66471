//! [`FamilyManifest`]: one family's sizes, tensors, layouts and variants, read from its manifest.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::pattern::Pattern;
use crate::manifest::rule::{MappingRule, MappingStep, RawMappingRule};
use crate::manifest::setting::Setting;
use crate::manifest::shape::{AppliedPer, AttendsTo, ExpectedTensor, Extent, TensorRule};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Sampling defaults of a variant.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SamplingDefaults {
    /// Steps of denoising.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Text tokens of the longer encoder; 0 where the family takes no text.
    pub text_tokens: usize,
    /// Evaluations of a step: two where the guidance is classifier-free.
    pub evaluations: usize,
}

/// A training of the family that is used in its own way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Variant {
    /// Name as in the manifest; "custom" where none fits.
    pub name: String,
    /// How it is best sampled.
    pub defaults: SamplingDefaults,
}

/// A manifest file as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawFamily {
    pub edition: u32,
    pub family: String,
    /// A family whose all is taken but its class, aliases and variants; what is said here stands in place of its own.
    pub like: Option<String>,
    class: Option<String>,
    #[serde(default)]
    aliases: Vec<String>,
    /// Pixels along a token's side: a number or a product of sizes.
    pixels_per_token: Option<Extent>,
    /// Pixels along a side of the pictures that it was trained on, where a setting tells.
    trained_side: Option<Extent>,
    /// Pixels along a side that it can have at most, where something limits them.
    largest_side: Option<Extent>,
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
    #[serde(default)]
    part: Vec<RawComponent>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLayout {
    name: String,
    /// A layout whose rules and signature are taken.
    like: Option<String>,
    #[serde(default)]
    present: Vec<String>,
    #[serde(default)]
    absent: Vec<String>,
    prefixes: Vec<String>,
    rules: Option<Vec<RawMappingRule>>,
    /// Where there are no rules: names that stand for canonical ones.
    #[serde(default)]
    rename: BTreeMap<String, String>,
    /// Names beyond those of the rules that are dropped, and why.
    #[serde(default)]
    drop: BTreeMap<String, String>,
    /// Settings that every file of this layout has, where config.json does not say otherwise.
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
    pub present: Vec<String>,
    pub absent: Vec<String>,
    pub prefixes: Vec<String>,
    pub inward: Vec<MappingStep>,
    pub outward: Vec<MappingStep>,
    pub settings: Map<String, Value>,
}

/// A family, ready for use.
#[derive(Debug, Clone, Default)]
pub(crate) struct FamilyManifest {
    pub name: String,
    pub class: String,
    pub aliases: Vec<String>,
    pub components: Vec<String>,
    pub optional_components: Vec<String>,
    pub settings: Vec<Setting>,
    pub layouts: Vec<Layout>,
    pixels_per_token: Option<Extent>,
    trained_side: Option<Extent>,
    largest_side: Option<Extent>,
    defaults: RawSamplingDefaults,
    tensors: Vec<TensorRule>,
    variants: Vec<RawVariant>,
    /// Parts of a pipeline that may lie in the transformer's file.
    pub parts: Vec<Arc<ComponentRule>>,
}

/// A part as the manifest of a family gives it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawComponent {
    pub name: String,
    /// The manifest that has its rules.
    pub kind: String,
    pub prefixes: Vec<String>,
    /// Settings that no tensor of it shows, where config.json does not say otherwise.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// More of them, by variant of the family.
    #[serde(default)]
    pub variants: BTreeMap<String, Map<String, Value>>,
    /// Tensors that the family has no use for, and why.
    #[serde(default)]
    pub unused: BTreeMap<String, String>,
    /// A tensor that is the identity for this family, and one that has as many rows.
    pub identity: Option<[String; 2]>,
}

/// A part of a family's files, and the rules of its kind.
#[derive(Debug)]
pub(crate) struct ComponentRule {
    pub raw: RawComponent,
    pub manifest: Arc<FamilyManifest>,
}

impl FamilyManifest {
    /// Reads a family that is new, on the ground of one that it is like; the error says what is wrong with it.
    pub fn new(raw: RawFamily, like: Option<&Self>, kinds: &[Arc<Self>]) -> Result<Self, String> {
        let class = raw.class.clone().ok_or("a new family needs a class")?;
        if like.is_some() && !raw.tensors.is_empty() {
            return Err("a family that is like another has that one's tensors and no others".to_owned());
        }
        let mut family = like.cloned().unwrap_or_default();
        (family.name, family.class, family.aliases) = (raw.family.clone(), class, raw.aliases.clone());
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

    /// What names blocks by a list must name one that there is.
    fn check_blocks(&self) -> Result<(), String> {
        let lists = |key: &str| self.settings.iter().any(|setting| setting.key == key && setting.lists_blocks());
        let steps = self.layouts.iter().flat_map(|layout| &layout.inward).map(|step| step.blocks.clone());
        let all = self.tensors.iter().map(TensorRule::blocks).chain(steps);
        let unknown =
            all.flat_map(|blocks| blocks.keys().map(str::to_owned).collect::<Vec<_>>()).find(|key| !lists(key));
        match unknown {
            None => Ok(()),
            Some(key) => Err(format!("{key:?} is neither \"last\" nor a setting that lists block numbers")),
        }
    }

    /// Puts the layouts, variants and parts of `raw` before its own, so that a user's come first. `kinds` are the rules
    /// of parts.
    pub fn extend(&mut self, raw: RawFamily, kinds: &[Arc<Self>]) -> Result<(), String> {
        let parts = raw.part.into_iter().map(|part| ComponentRule::new(part, kinds).map(Arc::new));
        self.parts.splice(0..0, parts.collect::<Result<Vec<_>, _>>()?);
        for (at, layout) in raw.layout.into_iter().enumerate() {
            let layout = self.layout(layout)?;
            self.layouts.insert(at, layout);
        }
        self.variants.splice(0..0, raw.variant);
        self.check_blocks()
    }

    /// Whether `class` is its class or an alias of it.
    pub fn is_class(&self, class: &str) -> bool {
        self.class == class || self.aliases.iter().any(|alias| alias == class)
    }

    /// Pixels along a side of the square that an image token stands for.
    pub fn pixels_per_token(&self, sizes: &ConfigValues) -> usize {
        self.pixels_per_token.as_ref().and_then(|extent| extent.value(sizes)).unwrap_or(16).max(1)
    }

    /// Pixels along a side of the pictures that a model of `sizes` was trained on, where that is known.
    pub fn trained_side(&self, sizes: &ConfigValues) -> Option<usize> {
        self.trained_side.as_ref()?.value(sizes)
    }

    /// Pixels along a side of the largest picture that a model of `sizes` can draw, where there is one.
    pub fn largest_side(&self, sizes: &ConfigValues) -> Option<usize> {
        self.largest_side.as_ref()?.value(sizes)
    }

    /// Every tensor a model of `sizes` has, what it acts on once, and what the tokens of a query see.
    pub fn weights(
        &self,
        sizes: &ConfigValues,
    ) -> impl Iterator<Item = (ExpectedTensor, Option<AppliedPer>, Option<AttendsTo>)> {
        self.tensors.iter().flat_map(|rule| {
            let tensors = rule.expand(sizes, self.blocks_of(&rule.name, sizes));
            tensors.into_iter().map(|tensor| (tensor, rule.per, rule.attends))
        })
    }

    /// Every tensor a model of `sizes` has.
    pub fn expected(&self, sizes: &ConfigValues) -> Vec<ExpectedTensor> {
        self.tensors.iter().flat_map(|rule| rule.expand(sizes, self.blocks_of(&rule.name, sizes))).collect()
    }

    /// The shape that the canonical tensor `name` must have, where it is known.
    pub fn expected_shape(&self, name: &str, sizes: &ConfigValues) -> Option<Vec<usize>> {
        let expected = self.expected(sizes).into_iter().find(|expected| expected.name == name)?;
        expected.shape.into_iter().collect()
    }

    /// Keys that count blocks.
    pub fn depths(&self) -> impl Iterator<Item = &str> {
        self.settings.iter().filter(|setting| setting.blocks.is_some()).map(|setting| setting.key.as_str())
    }

    /// The variants that `sizes` allow, in order.
    pub fn variants(&self, sizes: &ConfigValues) -> Vec<Variant> {
        let fitting = self.variants.iter().filter(|variant| sizes.satisfy(&variant.conditions));
        fitting.map(|variant| self.with_defaults(&variant.name, variant.defaults)).collect()
    }

    /// The variant called `name`, whatever the sizes.
    pub fn variant(&self, name: &str) -> Option<Variant> {
        let custom = (name == "custom").then(|| self.with_defaults(name, RawSamplingDefaults::default()));
        let named = self.variants.iter().find(|variant| variant.name == name);
        named.map(|variant| self.with_defaults(name, variant.defaults)).or(custom)
    }

    /// Names of all variants.
    pub fn variant_names(&self) -> Vec<String> {
        self.variants.iter().map(|variant| variant.name.clone()).chain(["custom".to_owned()]).collect()
    }

    fn with_defaults(&self, name: &str, own: RawSamplingDefaults) -> Variant {
        let RawSamplingDefaults { steps, guidance, text_tokens, evaluations } = own.or(self.defaults);
        let defaults = SamplingDefaults {
            steps: steps.unwrap_or(28),
            guidance: guidance.unwrap_or(1.0),
            text_tokens: text_tokens.unwrap_or(0),
            evaluations: evaluations.unwrap_or(1),
        };
        Variant { name: name.to_owned(), defaults }
    }

    /// How many blocks the number in the pattern `name` runs over.
    pub fn blocks_of(&self, name: &str, sizes: &ConfigValues) -> usize {
        let begins = |prefix: &String| name.starts_with(prefix);
        let counts = |setting: &&Setting| setting.blocks.as_ref().is_some_and(|blocks| blocks.all().iter().any(begins));
        self.settings.iter().find(counts).and_then(|setting| sizes.number(&setting.key)).unwrap_or(0)
    }

    fn layout(&self, raw: RawLayout) -> Result<Layout, String> {
        let mut rules = match (raw.rules, &raw.like) {
            (None, Some(like)) => {
                let like = self.layouts.iter().find(|layout| layout.name == *like);
                let like = like.ok_or_else(|| format!("layout {:?} is like an unknown one", raw.name))?;
                return Ok(Layout { name: raw.name, prefixes: raw.prefixes, ..like.clone() });
            }
            (Some(rules), None) => rules.into_iter().map(MappingRule::new).collect::<Result<Vec<_>, _>>()?,
            (None, None) => self.tensors.iter().map(|tensor| plain_rule(&tensor.name, &raw.rename)).collect::<Vec<_>>(),
            (Some(_), Some(_)) => return Err(format!("layout {:?} has both rules and like", raw.name)),
        };
        rules.extend(raw.drop.into_iter().map(|(name, reason)| MappingRule::drop(vec![Pattern::new(&name)], reason)));
        let (inward, outward): (Vec<_>, Vec<_>) = rules.into_iter().map(|rule| (rule.inward, rule.outward)).unzip();
        Ok(Layout {
            name: raw.name,
            present: raw.present,
            absent: raw.absent,
            prefixes: raw.prefixes,
            settings: raw.settings,
            inward,
            outward: outward.into_iter().flatten().collect(),
        })
    }
}

/// The rule that gives the canonical tensor `name`, which may stand under another name.
fn plain_rule(name: &str, renamed: &BTreeMap<String, String>) -> MappingRule {
    let foreign = renamed.iter().find(|(_, canonical)| *canonical == name).map_or(name, |(foreign, _)| foreign);
    MappingRule::same(foreign, name)
}

impl ComponentRule {
    /// Finds the rules of the kind; the error says what is wrong.
    pub fn new(raw: RawComponent, kinds: &[Arc<FamilyManifest>]) -> std::result::Result<Self, String> {
        let manifest = kinds.iter().find(|kind| kind.name == raw.kind).cloned();
        let manifest = manifest.ok_or_else(|| format!("part {:?} is of the kind {:?}: unknown", raw.name, raw.kind))?;
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
