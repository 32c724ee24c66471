//! [`hub_snapshot`]: where the files are in the cache of a model hub (`models--org--name`), which huggingface_hub
//! writes.

use std::path::{Path, PathBuf};

/// The folder of snapshots in the cache of one model.
const SNAPSHOTS: &str = "snapshots";
/// The file that names the current snapshot.
const CURRENT: &str = "refs/main";

/// The folder with the files of a model, where `folder` is the root of its cache: the snapshot that `refs/main` names,
/// or the only one. `None` if `folder` is not the root of a cache, or if there is more than one snapshot to choose
/// from.
pub fn hub_snapshot(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.join(SNAPSHOTS);
    let current = std::fs::read_to_string(folder.join(CURRENT)).unwrap_or_default();
    // The file may come from anywhere: its content must not lead out of the folder.
    let is_commit = |name: &str| !name.is_empty() && name.chars().all(|character| character.is_ascii_alphanumeric());
    let named = Some(current.trim()).filter(|name| is_commit(name)).map(|name| snapshots.join(name));
    named.filter(|folder| folder.is_dir()).or_else(|| only_entry(&snapshots))
}

/// What a folder without tensor files is, if it is the cache of one model or of several.
pub(crate) fn describe(folder: &Path) -> Option<String> {
    if let Some(snapshot) = hub_snapshot(folder) {
        return Some(format!(
            "this is the root of a hub cache; the files are in {0}: pass that folder",
            snapshot.display()
        ));
    }
    if folder.join(SNAPSHOTS).is_dir() && folder.join("refs").is_dir() {
        return Some("this is the root of a hub cache: pass one of the folders in \"snapshots\"".to_owned());
    }
    let model = std::fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let model = model.filter(|name| name.starts_with("models--")).min()?;
    Some(format!("this is a hub cache of several models: pass the snapshot of one, {model:?}/snapshots/COMMIT"))
}

/// The only folder in `folder`.
fn only_entry(folder: &Path) -> Option<PathBuf> {
    let mut entries = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let first = entries.next().filter(|entry| entry.is_dir())?;
    entries.next().is_none().then_some(first)
}
