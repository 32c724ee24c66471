//! [`Checkpoint`]: a file or folder of tensors that is open and checked, but not read.
//!
//! Tensors are read one at a time by positioned reads, so memory holds what the caller keeps and no more; threads may
//! share a checkpoint. It knows nothing of models.

use crate::folder::{FolderContents, ShardIndex};
use crate::header::{Header, HeaderEntry};
use crate::storage_view::FileRange;
use crate::wrapped::unwrapped;
use crate::{RawTensor, Result, TensorInfo, TensorSource, WeightsError, files, gguf, json, torch};
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
    tensors: BTreeMap<String, (usize, HeaderEntry)>,
    metadata: BTreeMap<String, String>,
    config: Option<Value>,
    notes: Vec<String>,
}

/// How a tensor is kept on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its number format as the file calls it; a quantised one is not that of [`ClearformTensorInfo`].
    pub format: String,
    /// Bytes that its values take, as the file keeps them.
    pub bytes: u64,
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
    /// Opens a safetensors file, a file of `torch.save`, a GGUF file, an index of shards, or a folder that holds one
    /// model as diffusers or transformers save it. Contents tell which a file is, not its name. Headers are read and
    /// checked; tensors are not, and the pickle of a torch file is interpreted as data and never run. Tensors that GGUF
    /// keeps quantised are given as F32. `config.json` is taken from beside files of the libraries' own names: beside
    /// others it would belong to something else.
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
            notes: listing.notes,
        };
        for file in listing.files {
            checkpoint.add(file)?;
        }
        if let Some(index) = &listing.index {
            checkpoint.agree(index)?;
        }
        checkpoint.unwrap_names()?;
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

    /// How the file keeps a tensor.
    pub fn stored(&self, name: &str) -> Option<StoredTensor> {
        let (_, entry) = self.tensors.get(name)?;
        Some(match entry.place.blocks() {
            Some((format, bytes)) => StoredTensor { format: gguf::name_of(format).to_owned(), bytes },
            None => StoredTensor { format: format!("{:?}", entry.dtype), bytes: entry.place.size() },
        })
    }

    /// What a person should know of these tensors: which of a training's states they are, what else the files hold, and
    /// which quantised formats were read as another.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = TensorFile::open(path)?;
        let header = file.header()?;
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
        self.notes.extend(header.notes);
        self.files.push(file);
        Ok(())
    }

    /// The index and the shards must tell the same.
    fn agree(&self, index: &ShardIndex) -> Result<()> {
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

    /// Takes off names what says nothing of the model.
    fn unwrap_names(&mut self) -> Result<()> {
        let wrapped: Vec<String> = self.tensors.keys().filter(|name| unwrapped(name) != **name).cloned().collect();
        for name in &wrapped {
            let (bare, place) = (unwrapped(name), self.tensors.remove(name));
            if self.tensors.contains_key(&*bare) {
                let reason = format!("tensor {bare:?} is here twice, once as {name:?}: keep the one that is meant");
                return Err(bad(&self.path, reason));
            }
            self.tensors.extend(place.map(|place| (bare.into_owned(), place)));
        }
        if !wrapped.is_empty() {
            self.notes.push(format!("{} names lost what torch's wrappers had put into them", wrapped.len()));
        }
        Ok(())
    }

    fn shard_of(&self, name: &str) -> Option<&str> {
        let (file, _) = self.tensors.get(name)?;
        self.files[*file].path.file_name()?.to_str()
    }

    fn find(&self, name: &str) -> Result<(&TensorFile, &HeaderEntry)> {
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
        let bytes = file.values(entry, 0..entry.place.size())?;
        Ok(RawTensor { dtype: entry.dtype, shape: entry.shape.clone(), bytes })
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let (file, entry) = self.find(name)?;
        if range.start > range.end || range.end as u64 > entry.place.size() {
            let reason = format!("bytes {range:?} asked of {}", entry.place.size());
            return Err(WeightsError::BadTensor { name: name.to_owned(), reason });
        }
        file.values(entry, range.start as u64..range.end as u64)
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

    fn header(&self) -> Result<Header> {
        let beginning = self.read(0..self.size.min(16))?;
        match beginning.as_slice() {
            beginning if gguf::recognises(beginning) => gguf::read(self),
            beginning if torch::recognises(beginning) => torch::read(self),
            _ => Header::read(&self.path, &self.file, self.size),
        }
    }

    fn values(&self, entry: &HeaderEntry, range: Range<u64>) -> Result<Vec<u8>> {
        self.wrap(entry.place.read(&self.file, range))
    }

    /// Reads bytes that the file has.
    pub(crate) fn read(&self, bytes: Range<u64>) -> Result<Vec<u8>> {
        self.wrap(files::read_at(&self.file, bytes.start, (bytes.end - bytes.start) as usize))
    }

    /// The error that says what is wrong with this file.
    pub(crate) fn bad(&self, reason: String) -> WeightsError {
        bad(&self.path, reason)
    }

    /// Reads all of `record`, unpacked.
    pub(crate) fn read_record(&self, record: &FileRange) -> Result<Vec<u8>> {
        self.wrap(record.read(&self.file, 0..record.size))
    }

    fn wrap(&self, read: std::io::Result<Vec<u8>>) -> Result<Vec<u8>> {
        read.map_err(|source| WeightsError::Io { path: self.path.clone(), source })
    }
}

fn listing(path: &Path) -> Result<FolderContents> {
    let about = std::fs::metadata(path).map_err(|source| WeightsError::Io { path: path.to_owned(), source })?;
    if about.is_dir() {
        FolderContents::of_folder(path)
    } else if path.to_string_lossy().ends_with(".index.json") {
        FolderContents::of_index(path.to_owned())
    } else {
        Ok(FolderContents::of_file(path.to_owned()))
    }
}

fn config_beside(path: &Path, listing: &FolderContents) -> Result<Option<Value>> {
    let ours = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        ["diffusion_pytorch_model", "model.", "model-", "pytorch_model"].iter().any(|ours| name.starts_with(ours))
    };
    let folder = if path.is_dir() { Some(path) } else { path.parent() };
    let config = folder.map(|folder| folder.join("config.json")).filter(|config| config.exists());
    match config {
        Some(config) if path.is_dir() || listing.files.iter().all(ours) => json::read_json(&config).map(Some),
        _ => Ok(None),
    }
}

fn describe(name: &str, entry: &HeaderEntry) -> TensorInfo {
    TensorInfo { name: name.to_owned(), dtype: entry.dtype, shape: entry.shape.clone() }
}

fn bad(path: &Path, reason: String) -> WeightsError {
    WeightsError::BadFile { path: path.to_owned(), reason }
}
