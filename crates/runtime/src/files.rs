//! Small files of a model, and where its transformer is.

use crate::{Result, RuntimeError};
use clearform_weights::{lfs_pointer, read_file};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Configs and vocabularies take a few MB. A much larger file is not one of them, and reading it could fill the memory.
const LARGEST: u64 = 256 << 20;

/// The transformer's name among the components of a pipeline, which adapters use.
pub(crate) const TRANSFORMER: &str = "transformer";

/// The transformer of `model`: its folder in a pipeline, or `model` itself if that is a transformer alone.
pub(crate) fn transformer_path(model: &Path) -> PathBuf {
    let folder = model.join(TRANSFORMER);
    if folder.is_dir() { folder } else { model.to_owned() }
}

/// The bytes of a config or vocabulary.
///
/// # Errors
/// The file is missing, larger than such files are, or only a git-lfs pointer.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |source| RuntimeError::Io { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > LARGEST {
        let reason = format!("expected a small file, found {size} bytes");
        return Err(RuntimeError::BadComponent { path: path.to_owned(), reason });
    }
    let bytes = read_file(path).map_err(io)?;
    match lfs_pointer(&bytes) {
        None => Ok(bytes),
        Some(reason) => Err(RuntimeError::BadComponent { path: path.to_owned(), reason }),
    }
}

/// The value of a JSON file.
///
/// # Errors
/// As [`read`], or the file is not JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_slice(&read(path)?).map_err(|error| RuntimeError::BadComponent {
        reason: format!("expected JSON: {error}. Copy the file again from where the model came from"),
        path: path.to_owned(),
    })
}

/// The text of a file.
///
/// # Errors
/// As [`read`], or the file is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?).map_err(|error| RuntimeError::BadComponent {
        reason: format!("expected text: {error}. Copy the file again from where the model came from"),
        path: path.to_owned(),
    })
}
