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

/// The files that decide what the adapter at `path` does: those of its tensors, and its adapter_config.json; of every
/// part of it.
///
/// # Errors
/// A file cannot be read.
pub fn adapter_files(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for part in adapter_parts(path) {
        let tensors = Checkpoint::open(&part)?;
        files.extend(tensors.files().iter().map(|file| file.path.clone()));
        files.extend(config_file(&part).filter(|_| !belongs_to_another(&part)));
    }
    Ok(files)
}

/// The parts of the adapter at `path`: of a folder without tensors the folders of components in which peft saved one
/// each, such as `transformer` and `text_encoder`; else `path` itself.
pub fn adapter_parts(path: &Path) -> Vec<PathBuf> {
    let parts = component_folders(path);
    if parts.is_empty() || entries(path).any(|entry| is_adapter(&entry)) { vec![path.to_owned()] } else { parts }
}

/// The folders of components within the folder `path` that hold an adapter.
fn component_folders(path: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = entries(path).filter(|folder| component_folder(folder).is_some()).collect();
    folders.sort();
    folders
}

/// A note that names the adapters of components in the folder `adapter`, if it has tensors of its own, which are read.
pub(crate) fn unread_parts(adapter: &Path) -> Option<String> {
    let folders = component_folders(adapter);
    let names: Vec<&OsStr> = folders.iter().filter_map(|folder| folder.file_name()).collect();
    (!names.is_empty()).then(|| {
        format!(
            "the tensors in {} are read, not those in its folders {names:?}: give each on its own",
            adapter.display()
        )
    })
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// The component that the adapter at `path` was saved for: the name of its folder, if peft saved it there by component.
pub(crate) fn component_of(path: &Path) -> Option<String> {
    let folder = if path.is_dir() { path } else { path.parent()? };
    component_folder(folder).filter(|_| !belongs_to_another(path))
}

/// The name of `folder`, if it is that of a component and peft's configuration of an adapter is in it.
fn component_folder(folder: &Path) -> Option<String> {
    /// Further components are text encoders.
    const COMPONENTS: [&str; 3] = ["transformer", "unet", "vae"];
    let real = folder.canonicalize().ok()?;
    let name = real.file_name()?.to_str()?;
    let number = |rest: &str| rest.strip_prefix('_').is_some_and(|number| number.parse::<u8>().is_ok());
    let is_encoder = name.strip_prefix("text_encoder").is_some_and(|rest| rest.is_empty() || number(rest));
    let is_component = COMPONENTS.contains(&name) || is_encoder;
    (is_component && folder.join(FILE_NAME).is_file()).then(|| name.to_owned())
}

fn is_adapter(path: &Path) -> bool {
    path.extension().is_some_and(|end| EXTENSIONS.iter().any(|known| end == *known))
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
    entries(folder).any(|other| is_adapter(&other) && other.file_name() != path.file_name())
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
    fn an_adapter_has_a_part_for_each_folder_of_a_component() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["transformer", "text_encoder", "text_encoder_2", "text_encoder_of_mine", "vae"] {
            std::fs::create_dir(path(name)).unwrap();
            write(&path(name).join("adapter_model.safetensors"));
            if name != "vae" {
                std::fs::write(path(name).join(FILE_NAME), "{}").unwrap();
            }
        }
        let parts = ["text_encoder", "text_encoder_2", "transformer"].map(path);
        assert_eq!(adapter_parts(folder.path()), parts);
        assert_eq!(adapter_parts(&parts[0]), [parts[0].clone()]);
        assert_eq!(adapter_files(folder.path()).unwrap().len(), 6);
        assert_eq!(component_of(&parts[1].join("adapter_model.safetensors")).as_deref(), Some("text_encoder_2"));
        assert_eq!(component_of(&path("text_encoder_of_mine")), None);
        assert_eq!(unread_parts(&parts[0]), None);
        // Tensors of its own are read alone, and the others named.
        write(&path("lora.safetensors"));
        assert_eq!(adapter_parts(folder.path()), [folder.path().to_owned()]);
        let note = unread_parts(folder.path()).unwrap();
        assert!(note.contains(r#"["text_encoder", "text_encoder_2", "transformer"]: give each on its own"#), "{note}");
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
        let files = |name: &str| adapter_files(&path(name)).unwrap().len();
        assert_eq!((files("adapter_model.safetensors"), files("other.safetensors")), (2, 1));
        std::fs::remove_file(path("adapter_model.safetensors")).unwrap();
        assert!(config("other.safetensors").text.is_some());
        std::fs::write(path(FILE_NAME), "version https://git-lfs.github.com/spec/v1\n").unwrap();
        let error = AdapterConfig::of(&Checkpoint::open(path("other.safetensors")).unwrap()).unwrap_err().to_string();
        assert!(error.contains("adapter_config.json") && error.contains("git lfs pull"), "{error}");
    }
}
