//! [`ModelRecord`]: what clearform.toml says of a portable model. Pure data; it opens nothing but its own file.

use crate::error::at;
use crate::{PortableModelError, Result};
use clearform_attention::AttentionPlan;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The only edition there is. A model of another one asks for an upgrade.
const EDITION: u32 = 1;

/// What a portable model is and where it came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecord {
    edition: u32,
    /// Family of the transformer.
    pub family: String,
    /// Variant, which sets sampling defaults.
    pub variant: String,
    /// The clearform that wrote it.
    pub version: String,
    /// The attention plan, as [`AttentionPlan::to_toml`] writes it.
    attention: toml::Table,
    /// Files it was made from.
    #[serde(default)]
    pub source: Vec<SourceRecord>,
    /// Adapters that were baked into it, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapter: Vec<AdapterRecord>,
    /// How it was distilled, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distillation: Option<DistillationRecord>,
    /// Every file of the model but clearform.toml itself.
    #[serde(default)]
    pub file: Vec<FileRecord>,
}

/// A file that a model was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Its name, without folders.
    pub name: String,
    /// Its hash.
    pub sha256: String,
}

/// An adapter that was baked into a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// Its file's name, without folders.
    pub name: String,
    /// Its hash.
    pub sha256: String,
    /// How strongly it was applied.
    pub strength: f64,
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path within the model, with `/` between folders.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Hash of the bytes.
    pub sha256: String,
}

/// How a model was distilled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DistillationRecord {
    /// Optimizer steps.
    pub steps: usize,
    /// Samples a step.
    pub batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Samples it was distilled on.
    pub samples: usize,
    /// Seed of noise and timesteps.
    pub seed: u64,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Mean loss of the last tenth of the steps.
    pub last_loss: f64,
}

impl ModelRecord {
    /// Name of the file.
    pub const FILE: &str = "clearform.toml";

    /// The record of a model that is yet to get its files.
    ///
    /// # Errors
    /// A plan that cannot be written.
    pub fn new(family: &str, variant: &str, plan: &AttentionPlan) -> Result<Self> {
        let attention = plan.to_toml().parse().map_err(|error: toml::de::Error| PortableModelError::Invalid {
            path: Self::FILE.into(),
            reason: format!("the attention plan: {error}"),
        })?;
        Ok(Self {
            edition: EDITION,
            family: family.to_owned(),
            variant: variant.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            attention,
            source: Vec::new(),
            adapter: Vec::new(),
            distillation: None,
            file: Vec::new(),
        })
    }

    /// Reads the record of the model in `folder`.
    ///
    /// # Errors
    /// No such file, another edition, or a file that is not a record.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(Self::FILE);
        let text = std::fs::read_to_string(&path).map_err(at(&path))?;
        let bad = |reason: String| PortableModelError::Invalid { path: path.clone(), reason };
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| bad(error.to_string()))?;
        let edition = table.get("edition").and_then(toml::Value::as_integer);
        if edition != Some(i64::from(EDITION)) {
            let found = edition.map_or("none".to_owned(), |edition| edition.to_string());
            return Err(bad(format!(
                "this clearform reads edition {EDITION}, the model has edition {found}; a newer clearform will read it"
            )));
        }
        table.try_into().map_err(|error: toml::de::Error| bad(error.to_string()))
    }

    /// Writes the record into `folder`.
    ///
    /// # Errors
    /// The system refused.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(Self::FILE);
        let text = toml::to_string(self)
            .map_err(|error| PortableModelError::Invalid { path: path.clone(), reason: error.to_string() })?;
        Ok(clearform_weights::write_atomically(path, text.as_bytes())?)
    }

    /// The attention plan.
    ///
    /// # Errors
    /// A plan that is none.
    pub fn plan(&self) -> Result<AttentionPlan> {
        Ok(AttentionPlan::from_toml(&self.attention.to_string())?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn record() -> ModelRecord {
        let plan: AttentionPlan = "clear:r=4.5,d=2".parse().unwrap();
        let mut record = ModelRecord::new("flux", "dev", &plan).unwrap();
        record.source.push(SourceRecord { name: "a \"b\".safetensors".into(), sha256: "00".into() });
        record.file.push(FileRecord { path: "transformer/config.json".into(), size: 3, sha256: "11".into() });
        record.distillation = Some(DistillationRecord {
            steps: 3,
            batch: 8,
            learning_rate: 6e-4,
            samples: 16,
            seed: 1,
            first_loss: 2.0,
            last_loss: 0.5,
        });
        record
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        record().write(folder.path()).unwrap();
        let read = ModelRecord::read(folder.path()).unwrap();
        assert_eq!(read, record());
        assert_eq!(read.plan().unwrap().to_string(), "clear:r=4.5,d=2");
    }

    #[test]
    fn another_edition_asks_for_an_upgrade() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(ModelRecord::FILE), "edition = 2\n").unwrap();
        let error = ModelRecord::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("edition 2") && error.contains("newer clearform"), "{error}");
    }
}
