//! [`IdentifiedFile`]: a ControlNet's file with its family, layout and sizes.

use crate::source::FileSource;
use candle_core::DType;
use clearform_attention::AttentionPlan;
use clearform_layout::{CanonicalSource, Hints, Identified, LayoutError, Manifests, Sidecar, detect_source};
use clearform_models::ModelError;
use clearform_plugin_abi::LOG_WARNING;
use clearform_plugin_abi::sdk::{AdapterFile, Result};
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;

const FLUX: &str = include_str!("../flux.toml");
const SD3: &str = include_str!("../sd3.toml");

/// A ControlNet's file.
pub struct IdentifiedFile {
    source: FileSource,
    identified: Identified,
    /// Its config.json as it was found.
    stated: Option<Value>,
}

impl IdentifiedFile {
    /// Identifies `file`. Where it has no config.json, `shared` are the settings that it shares with the model. A key of
    /// config.json that is not understood is a warning.
    ///
    /// # Errors
    /// A config.json that is not JSON, or a file that is no ControlNet of a known family.
    pub fn new(file: AdapterFile, shared: &Value) -> Result<Self> {
        let manifests = Manifests::alone("flux.toml", FLUX).and_then(|flux| flux.with_text("sd3.toml", SD3));
        let config = file.config().map(|config| serde_json::from_str::<Value>(&config)).transpose();
        let config = config.map_err(|error| format!("config.json: {error}"))?;
        let source = FileSource::new(file)?;
        let sidecar = Sidecar { config: Some(config.as_ref().unwrap_or(shared)), metadata: &BTreeMap::new() };
        let identified = detect_source(&source, sidecar, &manifests.map_err(message)?, &Hints::default());
        let identified = identified.map_err(message)?;
        for key in identified.unknown_keys() {
            source.file().log(LOG_WARNING, &format!("config.json: the key {key:?} is not understood and not used"));
        }
        Ok(Self { source, identified, stated: config })
    }

    /// Name of the ControlNet's family.
    pub fn family(&self) -> &str {
        &self.identified.family
    }

    /// Name of its layout.
    pub fn layout(&self) -> &str {
        &self.identified.layout
    }

    /// Its complete config.json.
    pub fn config(&self) -> &Value {
        &self.identified.config
    }

    /// Whether its config.json has the key `key`.
    pub fn states(&self, key: &str) -> bool {
        self.stated.as_ref().is_some_and(|config| config.get(key).is_some())
    }

    /// The shape of the tensor `name`, if the file has it.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.source.info(name)?.shape)
    }

    /// Shows a message to the user; `level` is [`LOG_WARNING`] and so on.
    pub fn log(&self, level: u32, message: &str) {
        self.source.file().log(level, message);
    }

    /// Builds the network from the tensors under canonical names.
    ///
    /// # Errors
    /// Tensors are missing, unknown, misshapen, or not stored as floating-point numbers.
    pub fn build<T>(
        &self,
        build: impl FnOnce(&CanonicalSource<&FileSource>, &AttentionPlan) -> clearform_models::Result<T>,
        plan: &AttentionPlan,
    ) -> Result<T> {
        let canonical = self.identified.canonical(&self.source).require_complete().map_err(message)?;
        build(&canonical, plan).map_err(model_message)
    }

    /// The only value of the tensor `name`; `None` if the file does not have it.
    ///
    /// # Errors
    /// It cannot be read, or has several values.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        if self.source.info(name).is_none() {
            return Ok(None);
        }
        let tensor = self.source.tensor(name).map_err(|error| error.to_string())?;
        let values = tensor.flatten_all().and_then(|all| all.to_dtype(DType::F64)?.to_vec1::<f64>());
        match values.map_err(|error| error.to_string())?[..] {
            [value] => Ok(Some(value)),
            _ => Err(format!("{name:?}: expected one value, found the shape {:?}", tensor.dims())),
        }
    }
}

fn message(error: LayoutError) -> String {
    error.to_string()
}

/// The text of a model's error.
pub fn model_message(error: ModelError) -> String {
    error.to_string()
}
