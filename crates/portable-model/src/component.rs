//! [`ComponentData`]: a part of a pipeline beside its transformer that is written anew, where others are copied as files.

use crate::{Result, StagingDir};
use clearform_layout::LoadReport;
use clearform_weights::{TensorInfo, TensorSource};
use serde_json::Value;

/// A VAE or a text encoder.
pub struct ComponentData {
    /// Name of its folder.
    pub name: String,
    /// Its config.json.
    pub config: Value,
    /// Its tensors, under the names of its class.
    pub tensors: Box<dyn TensorSource>,
    /// What became of those of its file.
    pub load_report: LoadReport,
}

impl ComponentData {
    /// Bytes of its tensors.
    pub fn byte_count(&self) -> u64 {
        self.tensors.tensors().iter().map(TensorInfo::byte_count).sum()
    }

    /// Writes it into the pipeline of `stage`, under the file names of its library.
    ///
    /// # Errors
    /// A tensor cannot be read, or the system refused.
    pub fn write(&self, stage: &mut StagingDir) -> Result<()> {
        let of_transformers = self.name.starts_with("text_encoder");
        let file = if of_transformers { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        let (name, tensors) = (&self.name, &self.tensors);
        stage.write_tensors(&format!("{name}/{file}"), &tensors.tensors(), |info| tensors.read(&info.name))?;
        stage.write(&format!("{name}/config.json"), &serde_json::to_vec_pretty(&self.config).unwrap_or_default())
    }
}
