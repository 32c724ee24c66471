//! [`Checkpoint`]: a file or folder of tensors that is open and checked, but not read.
//!
//! Tensors are read one at a time by positioned reads, so memory holds what the caller keeps and no more; threads may
//! share a checkpoint. It knows nothing of models.

use crate::folder::{Index, Listing};
use crate::header::{Entry, Header};
use crate::{RawTensor, Result, TensorInfo, TensorSource, WeightsError, files, json};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A directory of tensors on disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<TensorFile>,
    tensors: BTreeMap<String, (usize, Entry)>,
    metadata: BTreeMap<String, String>,
    config: Option<Value>,
}

/// One file of a checkpoint.
#[derive(Debug)]
pub struct TensorFile {
    /// Where it is, symbolic links not resolved.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    file: File,
}

impl Checkpoint {
    /// Opens a safetensors file, an index of shards, or a folder that holds one model as diffusers or transformers
    /// save it. Headers are read and checked; tensors are not. `config.json` is taken from beside files of the
    /// libraries' own names: beside others it would belong to something else.
    ///
    /// # Errors
    /// [`WeightsError::Io`] if a file cannot be read, [`WeightsError::BadFile`] if it is not what it should be.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let listing = listing(path)?;
        let config = config_beside(path, &listing)?;
        let mut checkpoint = Self {
            path: path.to_owned(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
            config,
        };
        for file in listing.files {
            checkpoint.add(file)?;
        }
        if let Some(index) = &listing.index {
            checkpoint.agree(index)?;
        }
        Ok(checkpoint)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Free text beside the tensors, of all files together; of two equal keys the first file's.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The `config.json` beside the tensors.
    pub fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = TensorFile::open(path)?;
        let header = Header::read(&file.path, &file.file, file.size)?;
        for (name, entry) in header.tensors {
            if let Some((first, _)) = self.tensors.get(&name) {
                let first = &self.files[*first].path;
                return Err(bad(&file.path, format!("tensor {name:?} is also in {}", first.display())));
            }
            self.tensors.insert(name, (self.files.len(), entry));
        }
        for (key, value) in header.metadata {
            self.metadata.entry(key).or_insert(value);
        }
        self.files.push(file);
        Ok(())
    }

    /// The index and the shards must tell the same.
    fn agree(&self, index: &Index) -> Result<()> {
        for (name, shard) in &index.weight_map {
            if self.shard_of(name) != Some(shard) {
                let found = self.shard_of(name).map_or("in none".to_owned(), |found| format!("in {found:?}"));
                return Err(bad(&index.path, format!("tensor {name:?} should be in {shard:?}, found {found}")));
            }
        }
        match self.tensors.keys().find(|name| !index.weight_map.contains_key(*name)) {
            Some(name) => {
                let shard = self.shard_of(name).unwrap_or_default();
                Err(bad(&index.path, format!("tensor {name:?} of {shard:?} is not in the index")))
            }
            None => Ok(()),
        }
    }

    fn shard_of(&self, name: &str) -> Option<&str> {
        let (file, _) = self.tensors.get(name)?;
        self.files[*file].path.file_name()?.to_str()
    }

    fn find(&self, name: &str) -> Result<(&TensorFile, &Entry)> {
        let missing = || WeightsError::Missing { name: name.to_owned() };
        self.tensors.get(name).map(|(file, entry)| (&self.files[*file], entry)).ok_or_else(missing)
    }
}

impl TensorSource for Checkpoint {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.tensors.iter().map(|(name, (_, entry))| describe(name, entry)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(_, entry)| describe(name, entry))
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        let (file, entry) = self.find(name)?;
        let bytes = file.read(entry.bytes.clone())?;
        Ok(RawTensor { dtype: entry.dtype, shape: entry.shape.clone(), bytes })
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let (file, entry) = self.find(name)?;
        let start = entry.bytes.start + range.start as u64;
        let end = entry.bytes.start + range.end as u64;
        if start > end || end > entry.bytes.end {
            let reason = format!("bytes {range:?} asked of {}", entry.bytes.end - entry.bytes.start);
            return Err(WeightsError::BadTensor { name: name.to_owned(), reason });
        }
        file.read(start..end)
    }
}

impl TensorFile {
    fn open(path: PathBuf) -> Result<Self> {
        let opened = std::fs::metadata(&path).and_then(|about| match about.is_file() {
            true => Ok((about.len(), File::open(&path)?)),
            false => Err(std::io::Error::other("not a regular file")),
        });
        match opened {
            Ok((size, file)) => Ok(Self { path, size, file }),
            Err(source) => Err(WeightsError::Io { path, source }),
        }
    }

    fn read(&self, bytes: Range<u64>) -> Result<Vec<u8>> {
        let length = (bytes.end - bytes.start) as usize;
        files::read_at(&self.file, bytes.start, length)
            .map_err(|source| WeightsError::Io { path: self.path.clone(), source })
    }
}

fn listing(path: &Path) -> Result<Listing> {
    let about = std::fs::metadata(path).map_err(|source| WeightsError::Io { path: path.to_owned(), source })?;
    if about.is_dir() {
        Listing::of_folder(path)
    } else if path.to_string_lossy().ends_with(".index.json") {
        Listing::of_index(path.to_owned())
    } else {
        Ok(Listing::of_file(path.to_owned()))
    }
}

fn config_beside(path: &Path, listing: &Listing) -> Result<Option<Value>> {
    let ours = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("diffusion_pytorch_model") || name.starts_with("model.") || name.starts_with("model-")
    };
    let folder = if path.is_dir() { Some(path) } else { path.parent() };
    let config = folder.map(|folder| folder.join("config.json")).filter(|config| config.exists());
    match config {
        Some(config) if path.is_dir() || listing.files.iter().all(ours) => json::read_json(&config).map(Some),
        _ => Ok(None),
    }
}

fn describe(name: &str, entry: &Entry) -> TensorInfo {
    TensorInfo { name: name.to_owned(), dtype: entry.dtype, shape: entry.shape.clone() }
}

fn bad(path: &Path, reason: String) -> WeightsError {
    WeightsError::BadFile { path: path.to_owned(), reason }
}
