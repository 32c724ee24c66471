//! [`StagingDir`]: a folder in which a model is put together, beside the place where it will stand. The model appears under
//! its name by one rename, when it is whole; a run that is killed leaves the old model or none.

use crate::error::at;
use crate::{FileRecord, ModelRecord, PortableModelError, Result};
use clearform_weights::{Digest, RawTensor, TensorInfo, TensorSource, digest};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use walkdir::WalkDir;

/// Name of the folder of the model's files within that of the work.
const STAGE: &str = "stage";

/// How files come from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyMode {
    /// As copies of their own.
    Copy,
    /// As further names of the same bytes, where the file system allows it.
    Link,
}

/// A model being put together. Dropped unfinished, it takes its files with it; what else the work left stays, for those
/// who go on with it.
#[derive(Debug)]
pub struct StagingDir {
    target: PathBuf,
    work: PathBuf,
    /// Of files that were hashed while they were written.
    digests: BTreeMap<String, Digest>,
}

impl StagingDir {
    /// Begins work on `target` in `target.work/`; `replace` allows `target` to be a portable model that stands.
    ///
    /// # Errors
    /// [`PortableModelError::AlreadyExists`] if `target` stands or work of an earlier run does.
    pub fn begin(target: &Path, replace: Overwrite) -> Result<Self> {
        let work = work_on(target, replace)?;
        if work.exists() {
            return Err(in_the_way(
                &work,
                "holds the work of an earlier run; go on with --resume, or delete it to begin anew",
            ));
        }
        Self::in_folder(target, work)
    }

    /// Goes on with earlier work on `target`, or begins if there is none.
    ///
    /// # Errors
    /// As [`Self::begin`], but for the earlier work.
    pub fn resume(target: &Path, replace: Overwrite) -> Result<Self> {
        let work = work_on(target, replace)?;
        // A killed run leaves half-written files there, and every file of the stage becomes part of the model.
        let left = work.join(STAGE);
        if left.exists() {
            fs::remove_dir_all(&left).map_err(at(&left))?;
        }
        Self::in_folder(target, work)
    }

    /// What is dropped from here on is this run's own.
    fn in_folder(target: &Path, work: PathBuf) -> Result<Self> {
        let stage = Self { target: target.to_owned(), work, digests: BTreeMap::new() };
        fs::create_dir_all(stage.folder()).map_err(at(&stage.work))?;
        Ok(stage)
    }

    /// Where the model's files go.
    pub fn folder(&self) -> PathBuf {
        self.work.join(STAGE)
    }

    /// Where everything else of the work goes: samples, training state.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Puts the files of `source`, a folder or a file, at `path` within the model. Symbolic links are followed.
    ///
    /// # Errors
    /// The system refused.
    pub fn copy_files(&self, source: &Path, path: &str, placing: CopyMode) -> Result<()> {
        for entry in WalkDir::new(source).follow_links(true).sort_by_file_name() {
            let entry = entry.map_err(|error| at(source)(error.into()))?;
            if entry.file_type().is_file() {
                let inside = entry.path().strip_prefix(source).unwrap_or(entry.path());
                let to = self.folder().join(path);
                put(entry.path(), &if inside == Path::new("") { to } else { to.join(inside) }, placing)?;
            }
        }
        Ok(())
    }

    /// Writes `tensors`, which `read` gives one after another, to the file at `path` within the model.
    ///
    /// # Errors
    /// What `read` says, or the system refused.
    pub fn write_tensors(
        &mut self,
        path: &str,
        tensors: &[TensorInfo],
        read: impl FnMut(&TensorInfo) -> clearform_weights::Result<RawTensor>,
    ) -> Result<()> {
        let whole = self.folder().join(path);
        create_parent(&whole)?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let digest = clearform_weights::write(&whole, tensors, &metadata, read)?;
        self.digests.insert(path.to_owned(), digest);
        Ok(())
    }

    /// Writes a small file at `path` within the model.
    ///
    /// # Errors
    /// The system refused.
    pub fn write(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let whole = self.folder().join(path);
        create_parent(&whole)?;
        Ok(clearform_weights::write_atomically(&whole, bytes)?)
    }

    /// Writes `source` in the place of the tensors of part `name`, whose files may be links to another model's.
    ///
    /// # Errors
    /// The part is not here, a tensor cannot be read, or the system refused.
    pub fn replace_tensors(&mut self, name: &str, source: &dyn TensorSource) -> Result<()> {
        let folder = self.folder().join(name);
        let entries =
            fs::read_dir(&folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(at(&folder))?;
        let is_tensors = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            [".safetensors", ".safetensors.index.json", ".bin"].iter().any(|ending| name.ends_with(ending))
        };
        let old: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).filter(is_tensors).collect();
        for path in &old {
            fs::remove_file(path).map_err(at(path))?;
        }
        let of_diffusers = old.iter().any(|path| path.to_string_lossy().contains("diffusion_pytorch_model"));
        let file = if of_diffusers { "diffusion_pytorch_model.safetensors" } else { "model.safetensors" };
        self.write_tensors(&format!("{name}/{file}"), &source.tensors(), |info| Ok(source.read(&info.name)?))
    }

    /// Bytes that are free where the stage lies.
    ///
    /// # Errors
    /// [`PortableModelError::DiskFull`] if they are fewer than `needed`.
    pub fn check_room(&self, needed: u64) -> Result<()> {
        let status = rustix::fs::statvfs(&self.work).map_err(|error| at(&self.work)(error.into()))?;
        let free = status.f_bavail.saturating_mul(status.f_frsize);
        if free < needed {
            return Err(PortableModelError::DiskFull { path: self.work.clone(), needed, free });
        }
        Ok(())
    }

    /// Records every file, brings all to the disk, and gives the model its name.
    ///
    /// # Errors
    /// The system refused; the old model, if any, then stands as it stood.
    pub fn finish(self, mut record: ModelRecord) -> Result<()> {
        let folder = self.folder();
        record.file = paths_of(&folder)?.into_iter().map(|path| self.record_file(path)).collect::<Result<_>>()?;
        record.write(&folder)?;
        sync_folders(&folder)?;
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
        // Nothing is left to tell an error to; what stays behind, the next run names.
        let _ = fs::remove_dir_all(self.folder());
        let _ = fs::remove_dir(&self.work);
    }
}

/// Whether a model that stands may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overwrite {
    /// Nothing may stand there.
    Never,
    /// A portable model may, and is replaced when the new one is whole.
    PortableModel,
}

impl Overwrite {
    /// A portable model may be replaced if `allowed`.
    pub fn allowed_if(allowed: bool) -> Self {
        if allowed { Self::PortableModel } else { Self::Never }
    }
}

/// The folder of the work on `target`.
fn work_on(target: &Path, replace: Overwrite) -> Result<PathBuf> {
    check_target(target, replace)?;
    let mut name = target.file_name().unwrap_or(target.as_os_str()).to_owned();
    name.push(".work");
    Ok(target.with_file_name(name))
}

fn check_target(target: &Path, replace: Overwrite) -> Result<()> {
    if !target.exists() {
        return Ok(());
    }
    let ours = target.join(ModelRecord::FILE).is_file();
    match (replace, ours) {
        (Overwrite::PortableModel, true) => Ok(()),
        (Overwrite::Never, true) => {
            Err(in_the_way(target, "stands already; give --overwrite to replace it, or another name"))
        }
        (_, false) => {
            Err(in_the_way(target, "stands and is no portable model, so it is not touched; give another name"))
        }
    }
}

fn in_the_way(path: &Path, reason: &str) -> PortableModelError {
    PortableModelError::AlreadyExists { path: path.to_owned(), reason: reason.to_owned() }
}

fn put(from: &Path, to: &Path, placing: CopyMode) -> Result<()> {
    create_parent(to)?;
    if to.exists() {
        fs::remove_file(to).map_err(at(to))?;
    }
    let real = fs::canonicalize(from).map_err(at(from))?;
    if placing == CopyMode::Link && fs::hard_link(&real, to).is_ok() {
        return Ok(());
    }
    fs::copy(&real, to).map_err(at(from))?;
    fs::File::open(to).and_then(|file| file.sync_all()).map_err(at(to))
}

/// Paths of every file below `folder` but the record, with `/` between folders, sorted.
pub(crate) fn paths_of(folder: &Path) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for entry in WalkDir::new(folder).sort_by_file_name() {
        let entry = entry.map_err(|error| at(folder)(error.into()))?;
        let inside = entry.path().strip_prefix(folder).unwrap_or(entry.path());
        let parts: Vec<_> = inside.iter().map(|part| part.to_string_lossy()).collect();
        let path = parts.join("/");
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
            // Systems that cannot sync a folder say so, and nothing more can be done.
            let _ = fs::File::open(entry.path()).and_then(|folder| folder.sync_all());
        }
    }
    Ok(())
}
