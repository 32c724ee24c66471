//! [`Checkpoint`]: a file or folder of tensors whose headers have been read and checked, but not its values.
//!
//! Tensors are read one at a time by position, so memory holds only what the caller keeps, and threads may share a
//! checkpoint.

use crate::folder::{FolderContents, ShardIndex};
use crate::header::{Header, HeaderEntry};
use crate::module_prefixes::unwrapped;
use crate::{
    QuantizedFormat, QuantizedMatrix, RawTensor, Result, TensorFile, TensorInfo, TensorSource, WeightsError, gguf,
    json, torch,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// How the names begin that diffusers and transformers give their files.
const LIBRARY_NAMES: [&str; 4] = ["diffusion_pytorch_model", "model.", "model-", "pytorch_model"];

/// Key of a safetensors file's metadata: the config.json of the model in it, as JSON.
pub const CONFIG_METADATA: &str = "clearform.config";

static OPENED: AtomicUsize = AtomicUsize::new(0);

/// How many checkpoints this process has opened. A command should open each file or folder once, and tests hold it to
/// that.
pub fn opened_checkpoints() -> usize {
    OPENED.load(Ordering::Relaxed)
}

/// The tensors of a file or folder, by name.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<TensorFile>,
    /// Each tensor with the index of its file in `files`.
    tensors: BTreeMap<String, (usize, HeaderEntry)>,
    metadata: BTreeMap<String, String>,
    config: Option<Value>,
    notes: Vec<String>,
}

/// How a tensor is stored on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its format as the file names it; of a quantised tensor another than the dtype of [`TensorInfo`].
    pub format: String,
    /// Bytes of its values as stored.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens a safetensors, `torch.save` or GGUF file, an index of shards, or a folder that holds one model as
    /// diffusers or transformers save it. The format follows from the contents, not from the name. Headers are read and
    /// checked, tensors are not; the pickle of a torch file is parsed as data and never run. GGUF's quantised tensors
    /// are read as F32. A `config.json` in the same folder is read only if the files have the libraries' standard
    /// names: next to other files it may belong to another model.
    ///
    /// # Errors
    /// [`WeightsError::Io`] if a file cannot be read, [`WeightsError::BadFile`] if it is damaged or of another format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        OPENED.fetch_add(1, Ordering::Relaxed);
        let path = path.as_ref();
        let contents = list_files(path)?;
        let config = read_config(path, &contents)?;
        let mut checkpoint = Self {
            path: path.to_owned(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
            config,
            notes: contents.notes,
        };
        for file in contents.files {
            checkpoint.add_file(file)?;
        }
        if let Some(index) = &contents.index {
            checkpoint.check_index(index)?;
        }
        checkpoint.unwrap_names()?;
        if checkpoint.config.is_none() {
            checkpoint.config = checkpoint.recorded_config()?;
        }
        Ok(checkpoint)
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files, in the order of the shards.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// The metadata of all files together; where two files have the same key, the first file's value.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The `config.json` that belongs to the tensors: that of their folder, or what the metadata have under
    /// [`CONFIG_METADATA`].
    pub fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    /// The class of the pipeline whose folder contains this folder, if its `model_index.json` states it.
    pub fn pipeline_class(&self) -> Option<String> {
        let index = self.path.parent().filter(|_| self.path.is_dir())?.join("model_index.json");
        let index: Value = json::read_json(&index).ok()?;
        index["_class_name"].as_str().map(str::to_owned)
    }

    /// How the tensor `name` is stored.
    pub fn stored(&self, name: &str) -> Option<StoredTensor> {
        let (_, entry) = self.tensors.get(name)?;
        Some(match entry.view.blocks() {
            Some((format, bytes)) => StoredTensor { format: gguf::block_format_name(format).to_owned(), bytes },
            None => StoredTensor { format: format!("{:?}", entry.dtype), bytes: entry.view.size() },
        })
    }

    /// What the user should know: which state dict of a training file was chosen, what else the files hold, and which
    /// quantised formats they have.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The config.json in the metadata, which `clearform export` writes.
    fn recorded_config(&self) -> Result<Option<Value>> {
        let config = self.metadata.get(CONFIG_METADATA).map(|text| serde_json::from_str(text));
        config.transpose().map_err(|error| bad(&self.path, format!("metadata {CONFIG_METADATA:?}: {error}")))
    }

    fn add_file(&mut self, path: PathBuf) -> Result<()> {
        let file = TensorFile::open(path)?;
        let header = read_header(&file)?;
        for (name, entry) in header.tensors {
            if let Some((first, _)) = self.tensors.get(&name) {
                let first = &self.files[*first].path;
                return Err(file.bad(format!("tensor {name:?} is also in {}", first.display())));
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

    /// The index and the shards must list the same tensors.
    fn check_index(&self, index: &ShardIndex) -> Result<()> {
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

    /// Removes what PyTorch's module wrappers add to names.
    fn unwrap_names(&mut self) -> Result<()> {
        let wrapped: Vec<String> = self.tensors.keys().filter(|name| unwrapped(name) != **name).cloned().collect();
        for name in &wrapped {
            let bare = unwrapped(name);
            let tensor = self.tensors.remove(name);
            if self.tensors.contains_key(&*bare) {
                let reason = format!("tensor {bare:?} appears twice, once as {name:?}: keep the one you want");
                return Err(bad(&self.path, reason));
            }
            self.tensors.extend(tensor.map(|tensor| (bare.into_owned(), tensor)));
        }
        if !wrapped.is_empty() {
            self.notes.push(format!("removed the module wrappers of PyTorch from {} tensor names", wrapped.len()));
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
        let bytes = file.read_view(&entry.view, 0..entry.view.size())?;
        Ok(RawTensor { dtype: entry.dtype, shape: entry.shape.clone(), bytes })
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let (file, entry) = self.find(name)?;
        if range.start > range.end || range.end as u64 > entry.view.size() {
            let reason = format!("bytes {range:?} requested of {}", entry.view.size());
            return Err(WeightsError::BadTensor { name: name.to_owned(), reason });
        }
        file.read_view(&entry.view, range.start as u64..range.end as u64)
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> Result<Option<QuantizedMatrix>> {
        let (file, entry) = self.find(name)?;
        let (Some((format, _)), [count, columns]) = (entry.view.blocks(), &entry.shape[..]) else { return Ok(None) };
        let format = QuantizedFormat::Blocks(format);
        let Some(row) = format.row_bytes(*columns).filter(|_| rows.end <= *count) else { return Ok(None) };
        let bytes = file.read_blocks(&entry.view, (rows.start * row) as u64..(rows.end * row) as u64)?;
        QuantizedMatrix::new(format, [rows.len(), *columns], bytes, Vec::new()).map(Some)
    }
}

/// Reads the header of `file`. GGUF and torch files have a magic number; safetensors files have none, so a file of
/// neither is taken for one, and its header is checked.
fn read_header(file: &TensorFile) -> Result<Header> {
    let beginning = file.read(0..file.size.min(16))?;
    match beginning.as_slice() {
        beginning if gguf::recognises(beginning) => gguf::read(file),
        beginning if torch::recognises(beginning) => torch::read(file),
        _ => Header::read(file),
    }
}

fn list_files(path: &Path) -> Result<FolderContents> {
    let metadata = std::fs::metadata(path).map_err(|source| WeightsError::Io { path: path.to_owned(), source })?;
    if metadata.is_dir() {
        FolderContents::of_folder(path)
    } else if path.to_string_lossy().ends_with(".index.json") {
        FolderContents::of_index(path.to_owned())
    } else {
        FolderContents::of_named_file(path.to_owned())
    }
}

fn read_config(path: &Path, contents: &FolderContents) -> Result<Option<Value>> {
    let folder = if path.is_dir() { Some(path) } else { path.parent() };
    let config = folder.map(|folder| folder.join("config.json")).filter(|config| config.exists());
    match config {
        Some(config) if path.is_dir() || contents.files.iter().all(|file| has_library_name(file)) => {
            json::read_json(&config).map(Some)
        }
        _ => Ok(None),
    }
}

fn has_library_name(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    LIBRARY_NAMES.iter().any(|beginning| name.starts_with(beginning))
}

fn describe(name: &str, entry: &HeaderEntry) -> TensorInfo {
    TensorInfo { name: name.to_owned(), dtype: entry.dtype, shape: entry.shape.clone() }
}

fn bad(path: &Path, reason: String) -> WeightsError {
    WeightsError::BadFile { path: path.to_owned(), reason }
}
