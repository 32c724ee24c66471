//! [`AdapterConfig`]: the adapter_config.json that peft writes beside the tensors of an adapter. What its keys mean is
//! the plugin's business.

use crate::Result;
use clearform_weights::{Checkpoint, read_json};
use serde_json::{Map, Value};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

const FILE_NAME: &str = "adapter_config.json";
/// How the names begin that peft gives to an adapter's files.
const PEFT_NAME: &str = "adapter_model";
/// Extensions of files that may be adapters.
const EXTENSIONS: [&str; 6] = ["safetensors", "bin", "pt", "pth", "ckpt", "gguf"];

/// The configuration of an adapter, and what the user should know about it.
#[derive(Debug, Default)]
pub(crate) struct AdapterConfig {
    /// The JSON object.
    pub text: Option<String>,
    /// Why a file is not read.
    pub note: Option<String>,
}

impl AdapterConfig {
    /// Reads the configuration in the folder of `adapter`. Beside a file that does not have peft's name it is read only
    /// if the folder holds no other adapter, which it may belong to.
    ///
    /// # Errors
    /// The file cannot be read, or is not a JSON object.
    pub fn of(adapter: &Checkpoint) -> Result<Self> {
        let Some(config) = config_file(adapter.path()) else { return Ok(Self::default()) };
        if belongs_to_another(adapter.path()) {
            let note = format!(
                "{} is not read: there are several adapters in its folder; name the one that it belongs to \
                 {PEFT_NAME}.safetensors, or move the others",
                config.display()
            );
            return Ok(Self { note: Some(note), text: None });
        }
        let keys: Map<String, Value> = read_json(&config)?;
        Ok(Self { text: Some(Value::Object(keys).to_string()), note: None })
    }
}

/// The files that decide what `adapter` does: those of its tensors, and its adapter_config.json.
pub fn adapter_files(adapter: &Checkpoint) -> Vec<PathBuf> {
    let config = config_file(adapter.path()).filter(|_| !belongs_to_another(adapter.path()));
    adapter.files().iter().map(|file| file.path.clone()).chain(config).collect()
}

/// The adapter_config.json in the folder of the adapter at `path`, a file or a folder.
fn config_file(path: &Path) -> Option<PathBuf> {
    let folder = if path.is_dir() { path } else { path.parent()? };
    Some(folder.join(FILE_NAME)).filter(|config| config.is_file())
}

/// Whether `path` is a file beside other adapters, to one of which an adapter_config.json may belong.
fn belongs_to_another(path: &Path) -> bool {
    let has_peft_name = |name: &OsStr| name.to_string_lossy().starts_with(PEFT_NAME);
    if path.is_dir() || path.file_name().is_none_or(has_peft_name) {
        return false;
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_adapter = |other: &Path| other.extension().is_some_and(|end| EXTENSIONS.iter().any(|known| end == *known));
    let others = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    others.into_iter().any(|other| is_adapter(&other) && other.file_name() != path.file_name())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};
    use clearform_weights::InMemoryTensors;
    use std::collections::BTreeMap;

    fn write(path: &Path) {
        let tensor = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let source = InMemoryTensors::from_iter([("a".to_owned(), tensor)]);
        clearform_weights::save(path, &source, &BTreeMap::new()).unwrap();
    }

    #[test]
    fn a_configuration_is_read_where_it_can_belong_to_one_adapter_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let config = |name: &str| AdapterConfig::of(&Checkpoint::open(path(name)).unwrap()).unwrap();
        write(&path("adapter_model.safetensors"));
        assert!(config("adapter_model.safetensors").text.is_none());
        std::fs::write(path(FILE_NAME), r#"{"r": 4, "b": 1, "a": 2}"#).unwrap();
        for name in ["", "adapter_model.safetensors"] {
            assert_eq!(config(name).text.as_deref(), Some(r#"{"r":4,"b":1,"a":2}"#), "{name:?}");
        }
        write(&path("other.safetensors"));
        assert!(config("adapter_model.safetensors").text.is_some());
        let other = config("other.safetensors");
        assert!(other.text.is_none() && other.note.unwrap().contains("there are several adapters in its folder"));
        let files = |name: &str| adapter_files(&Checkpoint::open(path(name)).unwrap()).len();
        assert_eq!((files("adapter_model.safetensors"), files("other.safetensors")), (2, 1));
        std::fs::remove_file(path("adapter_model.safetensors")).unwrap();
        assert!(config("other.safetensors").text.is_some());
        std::fs::write(path(FILE_NAME), "version https://git-lfs.github.com/spec/v1\n").unwrap();
        let error = AdapterConfig::of(&Checkpoint::open(path("other.safetensors")).unwrap()).unwrap_err().to_string();
        assert!(error.contains("adapter_config.json") && error.contains("git lfs pull"), "{error}");
    }
}
