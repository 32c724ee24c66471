//! [`ComponentData`]: a VAE or text encoder that is written from tensors; other components are copied as files.

use crate::{PortableModelError, Result, StagingDir};
use clearform_layout::LoadReport;
use clearform_weights::{TensorInfo, TensorSource};
use serde_json::Value;
use std::collections::BTreeMap;

/// A VAE or a text encoder.
pub struct ComponentData {
    /// Name of its folder in the pipeline.
    pub name: String,
    /// Its config.json.
    pub config: Value,
    /// Its tensors, under the names of its class in diffusers or transformers.
    pub tensors: Box<dyn TensorSource>,
    /// What became of each tensor of the file that it was read from.
    pub load_report: LoadReport,
}

impl ComponentData {
    /// Bytes of all tensors.
    pub fn byte_count(&self) -> u64 {
        self.tensors.tensors().iter().map(TensorInfo::byte_count).sum()
    }

    /// Writes the component into the pipeline in `stage`, with the file names of transformers for text encoders and of
    /// diffusers for the rest.
    ///
    /// # Errors
    /// A tensor cannot be read, or a file cannot be written.
    pub fn write(&self, stage: &mut StagingDir) -> Result<()> {
        let Self { name, config, tensors, .. } = self;
        let is_transformers = name.starts_with("text_encoder");
        let file = if is_transformers { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        stage.write_tensors(&format!("{name}/{file}"), &tensors.tensors(), BTreeMap::new(), |info| {
            Ok::<_, PortableModelError>(tensors.read(&info.name)?)
        })?;
        stage.write(&format!("{name}/config.json"), &serde_json::to_vec_pretty(config).unwrap_or_default())
    }
}
