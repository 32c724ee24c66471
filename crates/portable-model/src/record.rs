//! [`ModelRecord`]: the contents of clearform.toml.

use crate::error::at;
use crate::{PortableModelError, Result, VerdictRecord};
use clearform_attention::AttentionPlan;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Edition of the format; this is the only one so far. A model with another edition needs another version of clearform.
const EDITION: u32 = 1;

/// What a portable model is and where it came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecord {
    edition: u32,
    /// Family of the transformer.
    pub family: String,
    /// Variant of the family, which determines the sampling defaults.
    pub variant: String,
    /// Version of the clearform that wrote the model.
    pub version: String,
    /// The attention plan, as [`AttentionPlan::to_toml`] writes it.
    attention: toml::Table,
    /// The files that the model was made from.
    #[serde(default)]
    pub source: Vec<SourceRecord>,
    /// The components that came from files of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub component: Vec<ComponentRecord>,
    /// Adapters that were merged into the weights, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapter: Vec<AdapterRecord>,
    /// The attention patch that was applied to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patch: Option<PatchRecord>,
    /// How the model was distilled; `None` if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distillation: Option<DistillationRecord>,
    /// Every file of the model except clearform.toml itself.
    #[serde(default)]
    pub file: Vec<FileRecord>,
}

/// A file that a model was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Its name, without folders.
    pub name: String,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
}

/// A component that a model has from a file of its own, and not from the source or a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentRecord {
    /// The component, such as `text_encoder`.
    pub name: String,
    /// The file's name, without folders.
    pub file: String,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
}

/// An adapter that was merged into a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// Its file's name, without folders.
    pub name: String,
    /// SHA-256 of its bytes, hexadecimal; of its first file, if it has several.
    pub sha256: String,
    /// The factor it was applied with.
    pub strength: f64,
    /// Factors of blocks instead, by a text that their names contain.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub blocks: BTreeMap<String, f64>,
    /// Its other files: further shards, and peft's adapter_config.json.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub file: Vec<SourceRecord>,
}

/// An attention patch that was applied to a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchRecord {
    /// Its file's name, without folders.
    pub file: String,
    /// The attention that it was distilled for.
    pub attention: String,
    /// `replace` if its tensors replaced the model's, `shift` if the model's moved by what distillation changed.
    pub mode: String,
    /// Name of the patch's teacher, from which that was computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path within the model, with `/` between folders.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
}

/// How a model was distilled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DistillationRecord {
    /// The attention that it was distilled for; `None` in records of earlier versions, whose model has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<String>,
    /// Optimizer steps.
    pub steps: usize,
    /// Steps of the trainings before it, which the student was taken over from. The verdict's errors before are those
    /// before all of them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub earlier_steps: usize,
    /// Samples per step.
    pub batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Weights of the losses: against the target, the teacher's prediction and its attention outputs. Earlier versions did
    /// not record them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub losses: Option<[f64; 3]>,
    /// Number of training samples.
    pub samples: usize,
    /// Width and height of the samples in pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_size: Option<[usize; 2]>,
    /// Denoising steps of a sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_steps: Option<usize>,
    /// Seed of noise and timesteps.
    pub seed: u64,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Mean loss of the last tenth of the steps.
    pub last_loss: f64,
    /// How near the model is to its teacher; `None` if it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<VerdictRecord>,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl ModelRecord {
    /// Name of the file.
    pub const FILE: &str = "clearform.toml";

    /// The record of a model without its files, which [`StagingDir::finish`](crate::StagingDir::finish) adds.
    ///
    /// # Errors
    /// The plan cannot be written as TOML.
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
            component: Vec::new(),
            adapter: Vec::new(),
            patch: None,
            distillation: None,
            file: Vec::new(),
        })
    }

    /// Reads the record of the model in `folder`.
    ///
    /// # Errors
    /// The file is missing, has another edition, or is not a record.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(Self::FILE);
        if folder.exists() && !path.exists() {
            let reason = "is not a portable model: it has no clearform.toml, which `clearform convert` writes";
            return Err(PortableModelError::Invalid { path: folder.to_owned(), reason: reason.to_owned() });
        }
        let text = std::fs::read_to_string(&path).map_err(at(&path))?;
        let invalid = |reason: String| PortableModelError::Invalid { path: path.clone(), reason };
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| invalid(error.to_string()))?;
        // Before the rest is parsed: fields of a newer edition would only give "unknown field".
        match table.get("edition").and_then(toml::Value::as_integer) {
            Some(edition) if edition == i64::from(EDITION) => {}
            Some(edition) => {
                return Err(invalid(format!(
                    "this clearform reads edition {EDITION}, the model has edition {edition}; upgrade clearform to read it"
                )));
            }
            None => {
                let reason = "expected the record of a portable model, found no edition; copy the file again from where the \
                              model came from";
                return Err(invalid(reason.to_owned()));
            }
        }
        let record: Self = table.try_into().map_err(|error: toml::de::Error| invalid(error.to_string()))?;
        record.plan().map_err(|error| invalid(format!("attention: {error}")))?;
        Ok(record)
    }

    /// Writes the record into `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(Self::FILE);
        let text = toml::to_string(self)
            .map_err(|error| PortableModelError::Invalid { path: path.clone(), reason: error.to_string() })?;
        Ok(clearform_weights::write_atomically(path, text.as_bytes())?)
    }

    /// The attention that its weights were distilled for, by training or by a patch; `None` if they are the source's own.
    pub fn distilled_for(&self) -> Option<String> {
        let by_training = self.distillation.as_ref().map(|record| record.attention.clone());
        let by_patch = self.patch.as_ref().map(|patch| patch.attention.clone());
        match by_training {
            Some(recorded) => recorded.or_else(|| Some(self.plan().ok()?.to_string())),
            None => by_patch,
        }
    }

    /// The attention plan.
    ///
    /// # Errors
    /// The record's table is not a valid plan.
    pub fn plan(&self) -> Result<AttentionPlan> {
        Ok(AttentionPlan::from_toml(&self.attention.to_string())?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{ImageVerdict, LevelErrors};

    /// A record as earlier versions wrote it.
    const OLD: &str = r#"edition = 1
family = "flux"
variant = "dev"
version = "0.1.0"

[attention]
default = "clear:r=4.5,d=2"

[attention.layers]
"transformer_blocks.0.attn" = "full"

[[source]]
name = 'a "b".safetensors'
sha256 = "00"

[[adapter]]
name = "style.safetensors"
sha256 = "22"
strength = 0.75

[distillation]
steps = 3
batch = 8
learning_rate = 0.0006
samples = 16
seed = 1
first_loss = 2.0
last_loss = 0.5

[[file]]
path = "transformer/config.json"
size = 3
sha256 = "11"
"#;

    fn record() -> ModelRecord {
        let plan: AttentionPlan = "clear:r=4.5,d=2".parse().unwrap();
        let mut record = ModelRecord::new("flux", "dev", &plan).unwrap();
        record.source.push(SourceRecord { name: "a \"b\".safetensors".into(), sha256: "00".into() });
        record.file.push(FileRecord { path: "transformer/config.json".into(), size: 3, sha256: "11".into() });
        record.distillation = Some(DistillationRecord {
            attention: None,
            steps: 3,
            earlier_steps: 0,
            batch: 8,
            learning_rate: 6e-4,
            losses: None,
            samples: 16,
            sample_size: None,
            sample_steps: None,
            seed: 1,
            first_loss: 2.0,
            last_loss: 0.5,
            verdict: None,
        });
        record
    }

    fn adapter() -> AdapterRecord {
        let [name, sha256] = ["style.safetensors", "22"].map(str::to_owned);
        AdapterRecord { name, sha256, strength: 0.75, blocks: BTreeMap::new(), file: Vec::new() }
    }

    #[test]
    fn a_record_of_an_earlier_version_is_read() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(ModelRecord::FILE), OLD).unwrap();
        let read = ModelRecord::read(folder.path()).unwrap();
        let mut wanted = record();
        wanted.version = "0.1.0".to_owned();
        wanted.attention = read.attention.clone();
        wanted.adapter.push(adapter());
        assert_eq!(read, wanted);
        let plan = read.plan().unwrap();
        assert_eq!(plan.policy("transformer_blocks.0.attn").to_string(), "full");
        assert_eq!(plan.policy("transformer_blocks.1.attn").to_string(), "clear:r=4.5,d=2");
        // The format is unchanged.
        read.write(folder.path()).unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join(ModelRecord::FILE)).unwrap(), OLD);
    }

    #[test]
    fn a_written_record_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let shard = SourceRecord { name: "adapter_config.json".into(), sha256: "33".into() };
        let blocks = BTreeMap::from([("double".to_owned(), 1.0), ("single".to_owned(), 0.5)]);
        let mut written = record();
        written.adapter.push(AdapterRecord { blocks, file: vec![shard], ..adapter() });
        let [name, file, sha256] = ["vae", "ae.safetensors", "44"].map(str::to_owned);
        written.component.push(ComponentRecord { name, file, sha256 });
        let [file, mode] = ["clear-r4.safetensors", "shift"].map(str::to_owned);
        let attention = "clear:r=4".to_owned();
        written.patch = Some(PatchRecord { file, attention, mode, base: Some("FLUX.1-dev".to_owned()) });
        let distillation = written.distillation.as_mut().unwrap();
        distillation.losses = Some([0.0, 1.0, 0.5]);
        (distillation.sample_size, distillation.sample_steps) = (Some([256, 128]), Some(20));
        written.write(folder.path()).unwrap();
        let read = ModelRecord::read(folder.path()).unwrap();
        assert_eq!(read, written);
        assert_eq!(read.plan().unwrap().to_string(), "clear:r=4.5,d=2");
    }

    #[test]
    fn a_verdict_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut written = record();
        let images =
            ImageVerdict { count: 4, psnr_before: 12.5, psnr_after: 24.0, ssim_before: None, ssim_after: None };
        let level = LevelErrors { noise: 0.1, power: 1.0, before: 0.5, after: 0.25 };
        let verdict = VerdictRecord {
            samples: 16,
            power: 1.0,
            error_before: 0.5,
            error_after: 0.25,
            level: vec![level.clone(), LevelErrors { noise: 0.3, ..level }],
            images: Some(images),
        };
        assert_eq!((verdict.left(), verdict.of_power()), (0.5, 0.25));
        written.distillation.as_mut().unwrap().verdict = Some(verdict);
        written.write(folder.path()).unwrap();
        assert_eq!(ModelRecord::read(folder.path()).unwrap(), written);
    }

    #[test]
    fn another_edition_needs_an_upgrade() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(ModelRecord::FILE), "edition = 2\n").unwrap();
        let error = ModelRecord::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("the model has edition 2; upgrade clearform to read it"), "{error}");
    }
}
