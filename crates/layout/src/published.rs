//! [`PublishedModel`]: a model whose shapes are known without its file.

use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use serde_json::Value;

/// A published model, as the manifest of its family describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct PublishedModel {
    /// Its family and variant, such as `flux-dev`; the variant alone if that begins with the family.
    pub name: String,
    /// Its family.
    pub family: String,
    /// Its variant.
    pub variant: String,
    /// Its config.json, as far as shapes depend on it.
    pub config: Value,
}

impl Manifests {
    /// Every published model whose sizes a manifest states.
    pub fn published(&self) -> Vec<PublishedModel> {
        let of_family = self.families.iter().flat_map(|family| {
            family.published().map(|(variant, config)| PublishedModel {
                name: if variant.starts_with(&family.name) {
                    variant.into()
                } else {
                    format!("{}-{variant}", family.name)
                },
                family: family.name.clone(),
                variant: variant.to_owned(),
                config: config.clone(),
            })
        });
        of_family.collect()
    }

    /// The published model called `name`.
    ///
    /// # Errors
    /// [`LayoutError::NoSuch`], which lists those that there are.
    pub fn published_model(&self, name: &str) -> Result<PublishedModel> {
        let mut all = self.published();
        match all.iter().position(|model| model.name == name) {
            Some(found) => Ok(all.swap_remove(found)),
            None => Err(LayoutError::NoSuch {
                kind: "published model",
                name: name.to_owned(),
                choices: all.into_iter().map(|model| model.name).collect(),
            }),
        }
    }
}
