//! [`StagingDir`]: a folder beside the target in which a model is assembled. A complete model gets its name by a single
//! rename, so a run that is killed leaves the old model or none.

use crate::error::at;
use crate::{FileRecord, ModelRecord, PortableModelError, Result};
use clearform_weights::{Digest, RawTensor, TensorInfo, TensorSource, WeightsError, digest};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use walkdir::WalkDir;

/// Name of the folder of the model's files within the work folder.
const STAGE: &str = "stage";
/// Name of the file there that is locked while a process works on the model.
const LOCK: &str = "lock";

/// How files are taken from other folders.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// As copies.
    #[default]
    Copy,
    /// As hard links where the file system allows it, else as copies.
    Link,
}

/// A model being assembled. Dropped before [`finish`](Self::finish) it deletes the model's files; everything else in the
/// work folder stays for a resumed run.
#[derive(Debug)]
pub struct StagingDir {
    target: PathBuf,
    work: PathBuf,
    overwrite: Overwrite,
    /// Held as long as the work goes on, so that no other process resumes it.
    _lock: fs::File,
    /// Of files that were hashed while they were written.
    digests: BTreeMap<String, Digest>,
}

impl StagingDir {
    /// The folder `target.work/`, in which `target` is assembled.
    pub fn work_of(target: &Path) -> PathBuf {
        let mut name = target.file_name().unwrap_or(target.as_os_str()).to_owned();
        name.push(".work");
        target.with_file_name(name)
    }

    /// Starts work on `target` in the folder `target.work/`.
    ///
    /// # Errors
    /// [`PortableModelError::AlreadyExists`] if `target` exists and `overwrite` does not allow to replace it, or if the work
    /// of an earlier run exists.
    pub fn begin(target: &Path, overwrite: Overwrite) -> Result<Self> {
        let work = work_folder(target, overwrite)?;
        if work.exists() {
            if work.join(LOCK).exists() {
                drop(lock(&work)?); // not that of a run under way
            }
            return Err(already_exists(
                &work,
                "contains the work of an earlier run; pass --resume to continue it, or delete it to start over",
            ));
        }
        Self::in_folder(target, work, overwrite)
    }

    /// Continues earlier work on `target`, or starts if there is none.
    ///
    /// # Errors
    /// [`PortableModelError::AlreadyExists`] if `target` exists and `overwrite` does not allow to replace it.
    pub fn resume(target: &Path, overwrite: Overwrite) -> Result<Self> {
        Self::in_folder(target, work_folder(target, overwrite)?, overwrite)
    }

    fn in_folder(target: &Path, work: PathBuf, overwrite: Overwrite) -> Result<Self> {
        fs::create_dir_all(&work).map_err(at(&work))?;
        let _lock = lock(&work).inspect_err(|_| drop(fs::remove_dir(&work)))?;
        let stage = Self { target: target.to_owned(), work, overwrite, _lock, digests: BTreeMap::new() };
        let folder = stage.folder();
        // A killed run leaves half-written files there, and every file of the stage becomes part of the model.
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(at(&folder))?;
        }
        fs::create_dir(&folder).map_err(at(&folder))?;
        Ok(stage)
    }

    /// Removes the work folder `work` if there is nothing in it to go on with.
    pub fn remove_empty(work: &Path) {
        let is_lock = |entry: fs::DirEntry| entry.file_name() == LOCK;
        if fs::read_dir(work).is_ok_and(|mut left| left.all(|entry| entry.is_ok_and(is_lock))) {
            let _ = fs::remove_dir_all(work);
        }
    }

    /// Whether `name` is that of a file or folder in a work folder that says nothing of the work done.
    pub fn is_scaffold(name: &OsStr) -> bool {
        name == STAGE || name == LOCK
    }

    /// The folder of the model's files.
    pub fn folder(&self) -> PathBuf {
        self.work.join(STAGE)
    }

    /// The work folder, which also holds what does not become part of the model: samples, training state.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Copies `source`, a folder or a file, to `path` within the model. Symbolic links are followed.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn copy_files(&self, source: &Path, path: &str, mode: CopyMode) -> Result<()> {
        for entry in WalkDir::new(source).follow_links(true).sort_by_file_name() {
            let entry = entry.map_err(|error| at(source)(error.into()))?;
            if entry.file_type().is_file() {
                let relative = entry.path().strip_prefix(source).unwrap_or(entry.path());
                let target = self.folder().join(path);
                let is_file = relative == Path::new("");
                copy_file(entry.path(), &if is_file { target } else { target.join(relative) }, mode)?;
            }
        }
        Ok(())
    }

    /// Writes `tensors`, which `read` returns in order and one at a time, to the file at `path` within the model, with
    /// `metadata`.
    ///
    /// # Errors
    /// `read` fails, or the file cannot be written.
    pub fn write_tensors<E: From<WeightsError> + From<PortableModelError>>(
        &mut self,
        path: &str,
        tensors: &[TensorInfo],
        mut metadata: BTreeMap<String, String>,
        read: impl FnMut(&TensorInfo) -> std::result::Result<RawTensor, E>,
    ) -> std::result::Result<(), E> {
        // transformers refuses safetensors files without this key.
        metadata.insert("format".to_owned(), "pt".to_owned());
        self.write_with(path, |file| clearform_weights::write(file, tensors, &metadata, read))
    }

    /// Lets `write` write the file at `path` within the model.
    ///
    /// # Errors
    /// `write` fails, or the file's folder cannot be made.
    pub fn write_with<E: From<PortableModelError>>(
        &mut self,
        path: &str,
        write: impl FnOnce(&Path) -> std::result::Result<Digest, E>,
    ) -> std::result::Result<(), E> {
        let file = self.folder().join(path);
        create_parent(&file)?;
        self.digests.insert(path.to_owned(), write(&file)?);
        Ok(())
    }

    /// Writes a small file at `path` within the model.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let file = self.folder().join(path);
        create_parent(&file)?;
        Ok(clearform_weights::write_atomically(&file, bytes)?)
    }

    /// Replaces the tensors of component `name` by those of `source`. The old files are removed and not overwritten, since
    /// they may be hard links to the files of another model.
    ///
    /// # Errors
    /// The component does not exist, a tensor cannot be read, or a file cannot be written.
    pub fn replace_tensors(&mut self, name: &str, source: &dyn TensorSource) -> Result<()> {
        let folder = self.folder().join(name);
        let entries =
            fs::read_dir(&folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(at(&folder))?;
        let old: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).filter(|path| is_weight_file(path)).collect();
        for path in &old {
            fs::remove_file(path).map_err(at(path))?;
        }
        let is_diffusers = old.iter().any(|path| path.to_string_lossy().contains("diffusion_pytorch_model"));
        let file = if is_diffusers { "diffusion_pytorch_model.safetensors" } else { "model.safetensors" };
        self.write_tensors(&format!("{name}/{file}"), &source.tensors(), BTreeMap::new(), |info| {
            Ok(source.read(&info.name)?)
        })
    }

    /// Checks that `needed` bytes are free on the disk of the work folder.
    ///
    /// # Errors
    /// [`PortableModelError::DiskFull`] if they are not.
    pub fn check_disk_space(&self, needed: u64) -> Result<()> {
        let status = rustix::fs::statvfs(&self.work).map_err(|error| at(&self.work)(error.into()))?;
        let free = status.f_bavail.saturating_mul(status.f_frsize);
        if free < needed {
            return Err(PortableModelError::DiskFull { path: self.work.clone(), needed, free });
        }
        Ok(())
    }

    /// Adds every file to `record`, writes it, flushes everything to disk, and renames the folder to the target.
    ///
    /// # Errors
    /// A file cannot be read, written or renamed. An old model then remains as it was.
    pub fn finish(self, mut record: ModelRecord) -> Result<()> {
        let folder = self.folder();
        record.file = paths_of(&folder)?.into_iter().map(|path| self.record_file(path)).collect::<Result<_>>()?;
        record.write(&folder)?;
        sync_folders(&folder)?;
        // Something may have appeared there while the model was made.
        check_target(&self.target, self.overwrite)?;
        let old = self.work.join("replaced");
        if self.target.exists() {
            if old.exists() {
                fs::remove_dir_all(&old).map_err(at(&old))?;
            }
            fs::rename(&self.target, &old).map_err(at(&self.target))?;
        }
        fs::rename(&folder, &self.target).map_err(at(&self.target))?;
        fs::remove_dir_all(&self.work).map_err(at(&self.work))
    }

    fn record_file(&self, path: String) -> Result<FileRecord> {
        let Digest { size, sha256 } = match self.digests.get(&path) {
            Some(digest) => digest.clone(),
            None => digest(self.folder().join(&path))?,
        };
        Ok(FileRecord { path, size, sha256 })
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        // `drop` cannot return an error; the next run reports what remains.
        let _ = fs::remove_dir_all(self.folder());
        Self::remove_empty(&self.work);
    }
}

/// Whether a target that exists may be replaced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overwrite {
    /// The target must not exist.
    #[default]
    Never,
    /// A portable model is replaced once the new one is complete. Anything else is never replaced.
    PortableModel,
}

/// Locks the folder `work` for this process. Where a file system has no locks, nothing is locked.
fn lock(work: &Path) -> Result<fs::File> {
    let path = work.join(LOCK);
    let file = fs::File::create(&path).map_err(at(&path))?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => {
            Err(already_exists(work, "another process works on it: wait for it, or choose another name"))
        }
        _ => Ok(file),
    }
}

/// The work folder of `target`, if the target may be written.
fn work_folder(target: &Path, overwrite: Overwrite) -> Result<PathBuf> {
    check_target(target, overwrite)?;
    Ok(StagingDir::work_of(target))
}

/// Refuses a folder that exists and may not be replaced, or that lies within a portable model.
///
/// # Errors
/// [`PortableModelError::AlreadyExists`].
pub fn check_target(target: &Path, overwrite: Overwrite) -> Result<()> {
    if let Some(model) = surrounding_model(target) {
        let reason = format!(
            "is inside the portable model {}, whose files are recorded: choose a folder outside of it",
            model.display()
        );
        return Err(already_exists(target, &reason));
    }
    if target.is_symlink() {
        return Err(already_exists(target, "is a symbolic link: pass the folder that it stands for, or remove it"));
    }
    if !target.exists() {
        return Ok(());
    }
    let is_portable_model = target.join(ModelRecord::FILE).is_file();
    match (overwrite, is_portable_model) {
        (Overwrite::PortableModel, true) => check_holds_the_model_alone(target),
        (Overwrite::Never, true) => {
            Err(already_exists(target, "already exists; pass --overwrite to replace it, or choose another name"))
        }
        (_, false) => Err(already_exists(
            target,
            "already exists and is not a portable model, so --overwrite does not replace it; choose another name",
        )),
    }
}

/// Files in the folder of a model that its record does not have.
pub(crate) fn extra_files(folder: &Path, record: &ModelRecord) -> Result<Vec<String>> {
    let known: BTreeSet<&str> = record.file.iter().map(|file| file.path.as_str()).collect();
    Ok(paths_of(folder)?.into_iter().filter(|path| !known.contains(path.as_str())).collect())
}

/// Refuses to replace a folder with files that are not the model's. A record that cannot be read says nothing of them.
fn check_holds_the_model_alone(target: &Path) -> Result<()> {
    let extra = ModelRecord::read(target).and_then(|record| extra_files(target, &record)).unwrap_or_default();
    match extra.first() {
        None => Ok(()),
        Some(first) => {
            let more = if extra.len() > 1 { format!(" and {} more", extra.len() - 1) } else { String::new() };
            let reason =
                format!("holds files that are not the model's, {first}{more}: move them before it is replaced");
            Err(already_exists(target, &reason))
        }
    }
}

/// The portable model that `target` would be within.
pub fn surrounding_model(target: &Path) -> Option<PathBuf> {
    let target = std::path::absolute(target).ok()?;
    // Of what exists, links are followed.
    let parent = target.ancestors().skip(1).find_map(|folder| folder.canonicalize().ok())?;
    parent.ancestors().find(|folder| folder.join(ModelRecord::FILE).is_file()).map(Path::to_owned)
}

fn already_exists(path: &Path, reason: &str) -> PortableModelError {
    PortableModelError::AlreadyExists { path: path.to_owned(), reason: reason.to_owned() }
}

/// Whether `path` is a file of tensors, or the index of files that are.
fn is_weight_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    [".safetensors", ".safetensors.index.json", ".bin"].iter().any(|ending| name.ends_with(ending))
}

fn copy_file(from: &Path, to: &Path, mode: CopyMode) -> Result<()> {
    create_parent(to)?;
    if to.exists() {
        fs::remove_file(to).map_err(at(to))?;
    }
    // A hard link to a symbolic link would break with it.
    let real = fs::canonicalize(from).map_err(at(from))?;
    if mode == CopyMode::Link && fs::hard_link(&real, to).is_ok() {
        return Ok(());
    }
    fs::copy(&real, to).map_err(at(from))?;
    fs::File::open(to).and_then(|file| file.sync_all()).map_err(at(to))
}

/// Paths of all files below `folder` except the record, with `/` between folders, sorted.
fn paths_of(folder: &Path) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for entry in WalkDir::new(folder).sort_by_file_name() {
        let entry = entry.map_err(|error| at(folder)(error.into()))?;
        let relative = entry.path().strip_prefix(folder).unwrap_or(entry.path());
        let names: Vec<_> = relative.iter().map(|name| name.to_string_lossy()).collect();
        let path = names.join("/");
        if !entry.file_type().is_dir() && path != ModelRecord::FILE {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn create_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| fs::create_dir_all(parent).map_err(at(parent)))
}

fn sync_folders(folder: &Path) -> Result<()> {
    for entry in WalkDir::new(folder).into_iter().filter_map(|entry| entry.ok()) {
        if entry.file_type().is_dir() {
            // Some file systems cannot sync a folder; then nothing more can be done.
            let _ = fs::File::open(entry.path()).and_then(|folder| folder.sync_all());
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{ComponentData, PortableModel};
    use candle_core::{Device, Tensor};
    use clearform_attention::AttentionPlan;
    use clearform_layout::LoadReport;
    use clearform_weights::{Checkpoint, InMemoryTensors};

    fn tensors(value: f32) -> InMemoryTensors {
        let tensor = Tensor::full(value, (2, 3), &Device::Cpu).unwrap();
        [("conv.weight".to_owned(), tensor)].into_iter().collect()
    }

    fn value(path: &Path) -> Vec<f32> {
        let tensor = Checkpoint::open(path).unwrap().tensor("conv.weight").unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn record() -> ModelRecord {
        ModelRecord::new("flux", "dev", &AttentionPlan::full()).unwrap()
    }

    #[test]
    fn components_are_written_as_their_libraries_do() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        let mut stage = StagingDir::begin(&target, Overwrite::Never).unwrap();
        for (name, number) in [("vae", 1.0), ("text_encoder_2", 2.0)] {
            let config = serde_json::json!({ "size": number });
            let tensors = Box::new(tensors(number));
            let component =
                ComponentData { name: name.to_owned(), config, tensors, load_report: LoadReport::default() };
            assert_eq!(component.byte_count(), 24);
            component.write(&mut stage).unwrap();
        }
        stage.finish(record()).unwrap();
        assert_eq!(value(&target.join("vae/diffusion_pytorch_model.safetensors")), [1.0; 6]);
        assert_eq!(value(&target.join("text_encoder_2/model.safetensors")), [2.0; 6]);
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(target.join("text_encoder_2/config.json")).unwrap()).unwrap();
        assert_eq!(config["size"], 2.0);
        // Hashes that were computed while writing are those of the files.
        let report = PortableModel::verify(&target).unwrap();
        assert!(report.is_intact() && report.unchanged == 4, "{report}");
    }

    #[test]
    fn replaced_tensors_leave_the_linked_original_alone() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("vae");
        fs::create_dir(&source).unwrap();
        let original = source.join("diffusion_pytorch_model.safetensors");
        clearform_weights::save(&original, &tensors(1.0), &BTreeMap::new()).unwrap();
        fs::write(source.join("config.json"), "{}").unwrap();
        let target = folder.path().join("model");
        let mut stage = StagingDir::begin(&target, Overwrite::Never).unwrap();
        stage.copy_files(&source, "vae", CopyMode::Link).unwrap();
        stage.replace_tensors("vae", &tensors(3.0)).unwrap();
        stage.finish(record()).unwrap();
        assert_eq!(value(&target.join("vae/diffusion_pytorch_model.safetensors")), [3.0; 6]);
        assert_eq!(value(&original), [1.0; 6]);
        assert!(target.join("vae/config.json").is_file());
    }

    #[test]
    fn a_resumed_run_keeps_the_work_and_drops_half_written_files() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        let stage = StagingDir::begin(&target, Overwrite::Never).unwrap();
        let work = stage.work().to_owned();
        fs::write(work.join("losses.jsonl"), "{}").unwrap();
        stage.write("transformer/half.json", b"{").unwrap();
        // A killed run leaves all of it.
        let aside = folder.path().join("aside");
        fs::rename(&work, &aside).unwrap();
        drop(stage);
        fs::rename(&aside, &work).unwrap();
        let stage = StagingDir::resume(&target, Overwrite::Never).unwrap();
        assert!(!stage.folder().join("transformer").exists());
        assert!(work.join("losses.jsonl").exists());
        drop(stage);
        assert!(work.join("losses.jsonl").exists() && !work.join(STAGE).exists() && !target.exists());
    }

    #[test]
    fn a_full_disk_is_reported_before_writing() {
        let folder = tempfile::tempdir().unwrap();
        let stage = StagingDir::begin(&folder.path().join("model"), Overwrite::Never).unwrap();
        assert!(stage.check_disk_space(1).is_ok());
        let error = stage.check_disk_space(u64::MAX).unwrap_err().to_string();
        assert!(
            error.contains("18446744073709551615 bytes are needed") && error.contains("free some space"),
            "{error}"
        );
    }

    #[test]
    fn work_under_way_is_locked_and_what_appears_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        let stage = StagingDir::begin(&target, Overwrite::Never).unwrap();
        for second in [StagingDir::resume(&target, Overwrite::Never), StagingDir::begin(&target, Overwrite::Never)] {
            let error = second.unwrap_err().to_string();
            assert!(error.contains("another process works on it"), "{error}");
        }
        fs::create_dir(&target).unwrap();
        let appeared = stage.finish(record()).unwrap_err().to_string();
        assert!(appeared.contains("already exists"), "{appeared}");
        assert!(target.exists() && !folder.path().join("model.work").exists());
    }
}
