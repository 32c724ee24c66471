//! [`Manifests`]: the rules of all families, embedded in the program and added by users.
//!
//! This folder reads TOML and knows no checkpoint: [`family`] is a manifest, made of [`setting`]s (keys of
//! config.json), [`shape`]s (tensors) and [`rule`]s (renaming); [`config`] resolves the settings of one model.
//! `mapping` applies the rules, `detect` chooses between them.

mod block_filter;
pub(crate) mod config;
pub(crate) mod config_values;
pub(crate) mod conflict;
pub(crate) mod evidence;
pub(crate) mod family;
pub(crate) mod one_or_many;
pub(crate) mod pattern;
mod per_block;
pub(crate) mod rule;
mod setting;
pub(crate) mod shape;
pub(crate) mod unsupported;

use crate::error::{LayoutError, Result};
use crate::manifest::config::{DeclaredConfig, ResolvedConfig};
use crate::manifest::family::{FamilyManifest, RawFamily};
use crate::manifest::shape::ExpectedTensor;
use crate::manifest::unsupported::UnsupportedModels;
use clearform_weights::{WeightsError, read_file};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// The version of the manifest format.
const EDITION: u32 = 1;
const UNSUPPORTED: &str = include_str!("../../../../manifests/unsupported.toml");

/// The embedded manifests. The order decides which of two families is named first in messages.
const EMBEDDED: &[(&str, &str)] = &[
    ("dit.toml", include_str!("../../../../manifests/dit.toml")),
    ("flux.toml", include_str!("../../../../manifests/flux.toml")),
    ("minrf.toml", include_str!("../../../../manifests/minrf.toml")),
    ("pixart.toml", include_str!("../../../../manifests/pixart.toml")),
    ("sd3.toml", include_str!("../../../../manifests/sd3.toml")),
    ("sit.toml", include_str!("../../../../manifests/sit.toml")),
];

/// The embedded manifests of components.
const COMPONENT_KINDS: &[(&str, &str)] = &[
    ("components/clip.toml", include_str!("../../../../manifests/components/clip.toml")),
    ("components/t5.toml", include_str!("../../../../manifests/components/t5.toml")),
    ("components/tae.toml", include_str!("../../../../manifests/components/tae.toml")),
    ("components/vae.toml", include_str!("../../../../manifests/components/vae.toml")),
];
const REMEDY: &str = "pass the model's config.json with --config, or to commands without it a model that `clearform convert` or \
                      `clearform export` wrote, which has it";
const REMEDY_FOR_COMPONENTS: &str = "pass its config.json, in a folder of the component's name, with --components";

/// The rules of all families.
#[derive(Debug, Clone)]
pub struct Manifests {
    pub(crate) families: Vec<Arc<FamilyManifest>>,
    pub(crate) unsupported: Arc<UnsupportedModels>,
    /// How the user can pass a config.json, for errors.
    pub(crate) remedy: &'static str,
    /// The rules of components.
    kinds: Vec<Arc<FamilyManifest>>,
}

impl Manifests {
    /// The manifests embedded in the program. They are parsed at the first call; copies share them.
    ///
    /// # Errors
    /// [`LayoutError::BadManifest`] if the program was built with an invalid one.
    pub fn embedded() -> Result<Self> {
        static PARSED: OnceLock<Manifests> = OnceLock::new();
        match PARSED.get() {
            Some(parsed) => Ok(parsed.clone()),
            None => Self::parse_embedded().map(|parsed| PARSED.get_or_init(|| parsed).clone()),
        }
    }

    fn parse_embedded() -> Result<Self> {
        let unsupported: UnsupportedModels = parse("unsupported.toml", UNSUPPORTED)?;
        check_edition("unsupported.toml", unsupported.edition)?;
        let mut manifests = Self { unsupported: Arc::new(unsupported), ..Self::without_families()? };
        for (origin, text) in EMBEDDED {
            manifests.add(origin, text)?;
        }
        Ok(manifests)
    }

    /// The manifest `text` and no other family; `origin` is its name in errors.
    ///
    /// # Errors
    /// [`LayoutError::BadManifest`] if it is invalid.
    pub fn alone(origin: &str, text: &str) -> Result<Self> {
        let mut manifests = Self::without_families()?;
        manifests.add(origin, text)?;
        Ok(manifests)
    }

    /// The rules of components (VAEs and text encoders), each as a family.
    ///
    /// # Errors
    /// As [`Self::embedded`].
    pub fn components() -> Result<Self> {
        let embedded = Self::embedded()?;
        Ok(Self { families: embedded.kinds, kinds: Vec::new(), remedy: REMEDY_FOR_COMPONENTS, ..embedded })
    }

    /// The rules of a single component.
    pub(crate) fn for_component(kind: FamilyManifest, unsupported: &Arc<UnsupportedModels>) -> Self {
        Self {
            families: vec![Arc::new(kind)],
            unsupported: unsupported.clone(),
            remedy: REMEDY_FOR_COMPONENTS,
            kinds: Vec::new(),
        }
    }

    fn without_families() -> Result<Self> {
        let mut kinds = Vec::new();
        for (origin, text) in COMPONENT_KINDS {
            let bad = |reason| LayoutError::BadManifest { origin: (*origin).to_owned(), reason };
            let raw: RawFamily = parse(origin, text)?;
            check_edition(origin, raw.edition)?;
            kinds.push(Arc::new(FamilyManifest::new(raw, None, &[]).map_err(bad)?));
        }
        Ok(Self { families: Vec::new(), unsupported: Arc::default(), remedy: REMEDY, kinds })
    }

    /// Adds the manifest at `path`: a new family, or further layouts, variants and components of an existing one.
    ///
    /// # Errors
    /// [`LayoutError::Weights`] if it cannot be read, [`LayoutError::BadManifest`] if it is invalid.
    pub fn with_file(mut self, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| WeightsError::Io { path: path.to_owned(), source };
        let text =
            read_file(path).and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other)).map_err(io)?;
        self.add(&path.display().to_string(), &text)?;
        Ok(self)
    }

    /// Adds the manifest `text`, as [`Self::with_file`] does; `origin` is its name in errors.
    ///
    /// # Errors
    /// [`LayoutError::BadManifest`] if it is invalid.
    pub fn with_text(mut self, origin: &str, text: &str) -> Result<Self> {
        self.add(origin, text)?;
        Ok(self)
    }

    /// Names of the families.
    pub fn families(&self) -> Vec<String> {
        self.families.iter().map(|family| family.name.clone()).collect()
    }

    /// Names of the layouts of `family`.
    pub fn layouts(&self, family: &str) -> Vec<String> {
        let layouts = self.families.iter().filter(|known| known.name == family).flat_map(|family| &family.layouts);
        layouts.map(|layout| layout.name.clone()).collect()
    }

    /// Every canonical tensor of a model of `family` with the sizes in `config`, a config.json of diffusers.
    ///
    /// # Errors
    /// [`LayoutError::NoSuch`] for an unknown family, [`LayoutError::Ambiguous`] for a size that neither `config` nor
    /// the family has.
    pub fn expected(&self, family: &str, config: &Value) -> Result<Vec<ExpectedTensor>> {
        let known = self.families.iter().find(|known| known.name == family).ok_or_else(|| LayoutError::NoSuch {
            kind: "family",
            name: family.to_owned(),
            choices: self.families(),
        })?;
        let metadata = BTreeMap::new();
        let declared = DeclaredConfig {
            config: Some(config),
            metadata: &metadata,
            layout: None,
            variant: None,
            remedy: self.remedy,
        };
        let resolved = ResolvedConfig::new(&known.settings, &BTreeMap::new(), declared)?;
        Ok(known.expected(&resolved.sizes))
    }

    /// Whether the family has a variant of this name.
    pub fn has_variant(&self, family: &str, variant: &str) -> bool {
        let known = self.families.iter().find(|known| known.name == family);
        variant != "custom" && known.is_some_and(|known| known.variant(variant).is_some())
    }

    fn base_family(&self, name: Option<&str>) -> std::result::Result<Option<&FamilyManifest>, String> {
        let Some(name) = name else { return Ok(None) };
        let family = self.families.iter().find(|family| family.name == name);
        family.map(|family| Some(&**family)).ok_or_else(|| {
            format!("it is like the family {name:?}, which is unknown; use one of {:?}", self.families())
        })
    }

    fn add(&mut self, origin: &str, text: &str) -> Result<()> {
        let bad = |reason| LayoutError::BadManifest { origin: origin.to_owned(), reason };
        let raw: RawFamily = parse(origin, text)?;
        check_edition(origin, raw.edition)?;
        match self.families.iter_mut().find(|family| family.name == raw.family) {
            Some(_) if raw.like.is_some() => {
                Err(bad(format!("{:?} is already a family: `like` is only for new ones", raw.family)))
            }
            Some(family) => Arc::make_mut(family).extend(raw, &self.kinds).map_err(bad),
            None => {
                let like = self.base_family(raw.like.as_deref()).map_err(bad)?;
                self.families.push(Arc::new(FamilyManifest::new(raw, like, &self.kinds).map_err(bad)?));
                Ok(())
            }
        }
    }
}

fn parse<T: DeserializeOwned>(origin: &str, text: &str) -> Result<T> {
    toml::from_str(text)
        .map_err(|error| LayoutError::BadManifest { origin: origin.to_owned(), reason: error.to_string() })
}

fn check_edition(origin: &str, edition: u32) -> Result<()> {
    match edition {
        EDITION => Ok(()),
        _ => {
            let reason = format!("edition {edition}, expected {EDITION}: upgrade clearform or change the manifest");
            Err(LayoutError::BadManifest { origin: origin.to_owned(), reason })
        }
    }
}
