//! [`Manifests`]: every family's rules, those in the program and those a user adds.

use crate::error::{LayoutError, Result};
use crate::manifest::config::{DeclaredConfig, ResolvedConfig};
use crate::manifest::family::{FamilyManifest, RawFamily};
use crate::manifest::shape::ExpectedTensor;
use crate::manifest::unsupported::UnsupportedModels;
use clearform_weights::{TensorSource, WeightsError};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

mod block_filter;
pub(crate) mod config;
pub(crate) mod config_values;
mod evidence;
pub(crate) mod family;
mod one_or_many;
pub(crate) mod pattern;
mod per_block;
pub(crate) mod rule;
mod setting;
pub(crate) mod shape;
pub(crate) mod unsupported;

const EDITION: u32 = 1;
const KNOWN: &str = include_str!("../../../../manifests/unsupported.toml");

/// The manifests in the program, alphabetically.
const EMBEDDED: &[(&str, &str)] = &[
    ("dit.toml", include_str!("../../../../manifests/dit.toml")),
    ("flux.toml", include_str!("../../../../manifests/flux.toml")),
    ("minrf.toml", include_str!("../../../../manifests/minrf.toml")),
    ("pixart.toml", include_str!("../../../../manifests/pixart.toml")),
    ("sd3.toml", include_str!("../../../../manifests/sd3.toml")),
    ("sit.toml", include_str!("../../../../manifests/sit.toml")),
];

/// The manifests of parts of a pipeline in the program, alphabetically.
const COMPONENT_KINDS: &[(&str, &str)] = &[
    ("components/clip.toml", include_str!("../../../../manifests/components/clip.toml")),
    ("components/t5.toml", include_str!("../../../../manifests/components/t5.toml")),
    ("components/vae.toml", include_str!("../../../../manifests/components/vae.toml")),
];
const REMEDY: &str = "give the model's config.json with --config";
const REMEDY_OF_PARTS: &str = "give its config.json, in a folder of its name, with --components";

/// All rules.
#[derive(Debug, Clone)]
pub struct Manifests {
    pub(crate) families: Vec<Arc<FamilyManifest>>,
    pub(crate) known: Arc<UnsupportedModels>,
    /// How a config.json is given to what these are the rules of.
    pub(crate) remedy: &'static str,
    kinds: Vec<Arc<FamilyManifest>>,
}

impl Manifests {
    /// The manifests in the program.
    ///
    /// # Errors
    /// [`LayoutError::BadManifest`] if the program was built with a broken one.
    pub fn embedded() -> Result<Self> {
        let known: UnsupportedModels = parse("unsupported.toml", KNOWN)?;
        check_edition("unsupported.toml", known.edition)?;
        let mut manifests = Self { known: Arc::new(known), ..Self::without_families()? };
        for (origin, text) in EMBEDDED {
            manifests.add(origin, text)?;
        }
        Ok(manifests)
    }

    /// The one manifest `text`, and nothing that is known besides; `origin` is what errors call it.
    ///
    /// # Errors
    /// [`LayoutError::BadManifest`] if it is none.
    pub fn alone(origin: &str, text: &str) -> Result<Self> {
        let mut manifests = Self::without_families()?;
        manifests.add(origin, text)?;
        Ok(manifests)
    }

    /// The rules of parts, those of VAEs and text encoders, as if these were families.
    ///
    /// # Errors
    /// As [`Self::embedded`].
    pub fn components() -> Result<Self> {
        let embedded = Self::embedded()?;
        Ok(Self { families: embedded.kinds, kinds: Vec::new(), remedy: REMEDY_OF_PARTS, ..embedded })
    }

    /// The rules of one part alone.
    pub(crate) fn for_component(kind: FamilyManifest, known: &Arc<UnsupportedModels>) -> Self {
        Self { families: vec![Arc::new(kind)], known: known.clone(), remedy: REMEDY_OF_PARTS, kinds: Vec::new() }
    }

    fn without_families() -> Result<Self> {
        let mut kinds = Vec::new();
        for (origin, text) in COMPONENT_KINDS {
            let bad = |reason| LayoutError::BadManifest { origin: (*origin).to_owned(), reason };
            let raw: RawFamily = parse(origin, text)?;
            check_edition(origin, raw.edition)?;
            kinds.push(Arc::new(FamilyManifest::new(raw, None, &[]).map_err(bad)?));
        }
        Ok(Self { families: Vec::new(), known: Arc::default(), remedy: REMEDY, kinds })
    }

    /// These and the manifest at `path`: a new family, or more layouts and variants of one that is here.
    ///
    /// # Errors
    /// [`LayoutError::Weights`] if it cannot be read, [`LayoutError::BadManifest`] if it is not a manifest.
    pub fn with_file(mut self, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| WeightsError::Io { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(io)?;
        self.add(&path.display().to_string(), &text)?;
        Ok(self)
    }

    /// `source` is none of what is refused by name whatever family it is of, such as an adapter or a quantised model whose
    /// format is not read.
    ///
    /// # Errors
    /// [`LayoutError::Unsupported`], which says what it is.
    pub fn accept(&self, source: &dyn TensorSource) -> Result<()> {
        let tensors = source.tensors();
        self.known.refuse(&tensors.iter().map(|info| info.name.as_str()).collect())
    }

    /// Names of the families.
    pub fn families(&self) -> Vec<String> {
        self.families.iter().map(|family| family.name.clone()).collect()
    }

    /// Names of a family's layouts.
    pub fn layouts(&self, family: &str) -> Vec<String> {
        let layouts = self.families.iter().filter(|known| known.name == family).flat_map(|family| &family.layouts);
        layouts.map(|layout| layout.name.clone()).collect()
    }

    /// Every canonical tensor of a `family` model of the sizes in `config`, a diffusers config.json.
    ///
    /// # Errors
    /// [`LayoutError::NoSuch`] for an unknown family; otherwise a size that neither `config` nor the family has.
    pub fn expected(&self, family: &str, config: &Value) -> Result<Vec<ExpectedTensor>> {
        let known = self.families.iter().find(|known| known.name == family).ok_or_else(|| LayoutError::NoSuch {
            kind: "family",
            name: family.to_owned(),
            choices: self.families(),
        })?;
        let metadata = BTreeMap::new();
        let declared = DeclaredConfig { config: Some(config), metadata: &metadata, layout: None, remedy: self.remedy };
        let settled = ResolvedConfig::new(&known.settings, &BTreeMap::new(), declared)?;
        Ok(known.expected(&settled.sizes))
    }

    fn base_family(&self, name: Option<&str>) -> std::result::Result<Option<&FamilyManifest>, String> {
        let Some(name) = name else { return Ok(None) };
        let family = self.families.iter().find(|family| family.name == name);
        family.map(|family| Some(&**family)).ok_or_else(|| format!("it is like the family {name:?}, which is unknown"))
    }

    fn add(&mut self, origin: &str, text: &str) -> Result<()> {
        let bad = |reason| LayoutError::BadManifest { origin: origin.to_owned(), reason };
        let raw: RawFamily = parse(origin, text)?;
        check_edition(origin, raw.edition)?;
        match self.families.iter_mut().find(|family| family.name == raw.family) {
            Some(_) if raw.like.is_some() => {
                Err(bad(format!("{:?} is already a family: like is for new ones", raw.family)))
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
            let reason = format!("edition {edition}; this program reads edition {EDITION}: upgrade it");
            Err(LayoutError::BadManifest { origin: origin.to_owned(), reason })
        }
    }
}
