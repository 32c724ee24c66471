//! [`SafetensorsWriter`]: writes a safetensors file tensor by tensor, so that memory holds one of them.
//!
//! The file appears under its name only when whole. It does not read tensors; [`save`] does.

use crate::header::byte_count;
use crate::{RawTensor, Result, TensorInfo, TensorSource, WeightsError, files};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Data begin at a multiple of this, as the safetensors library has it.
const ALIGNMENT: usize = 8;

/// Writes all of `source` to `path`, one tensor at a time.
///
/// # Errors
/// The first tensor that cannot be read or written; `path` is then as it was.
pub fn save(path: impl AsRef<Path>, source: &dyn TensorSource, metadata: &BTreeMap<String, String>) -> Result<()> {
    let tensors = source.tensors();
    let mut writer = SafetensorsWriter::create(path, &tensors, metadata)?;
    for TensorInfo { name, .. } in &tensors {
        writer.write(name, &source.read(name)?)?;
    }
    writer.finish()
}

/// A safetensors file being written.
#[derive(Debug)]
pub struct SafetensorsWriter {
    path: PathBuf,
    file: NamedTempFile,
    pending: BTreeMap<String, Slot>,
}

#[derive(Debug)]
struct Slot {
    info: TensorInfo,
    offset: u64,
    size: u64,
}

impl SafetensorsWriter {
    /// Begins a file that will hold `tensors`. Data are laid out by falling width of their number format, then by
    /// name, which keeps every tensor aligned; [`Self::write`] takes them in any order.
    ///
    /// # Errors
    /// [`WeightsError::BadTensor`] for equal names or a size that is no whole number of bytes, [`WeightsError::Io`]
    /// if the folder cannot be written to.
    pub fn create(path: impl AsRef<Path>, tensors: &[TensorInfo], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let mut slots = place(tensors)?;
        let header = header(&slots, metadata);
        for slot in &mut slots {
            slot.offset += header.len() as u64;
        }
        let size = slots.last().map_or(header.len() as u64, |last| last.offset + last.size);
        let file = begin(&path, &header, size).map_err(|source| WeightsError::Io { path: path.clone(), source })?;
        let pending = slots.into_iter().map(|slot| (slot.info.name.clone(), slot)).collect();
        Ok(Self { path, file, pending })
    }

    /// Writes one of the announced tensors.
    ///
    /// # Errors
    /// [`WeightsError::Missing`] for a name not announced or already written, [`WeightsError::BadTensor`] for another
    /// number format or shape than announced, [`WeightsError::Io`] if writing fails.
    pub fn write(&mut self, name: &str, tensor: &RawTensor) -> Result<()> {
        let slot = self.pending.get(name).ok_or_else(|| WeightsError::Missing { name: name.to_owned() })?;
        slot.accept(tensor)?;
        let file = self.file.as_file_mut();
        let written = file.seek(SeekFrom::Start(slot.offset)).and_then(|_| file.write_all(&tensor.bytes));
        written.map_err(|source| WeightsError::Io { path: self.path.clone(), source })?;
        self.pending.remove(name);
        Ok(())
    }

    /// Brings the file to the disk and gives it its name.
    ///
    /// # Errors
    /// [`WeightsError::Missing`] if an announced tensor was not written, [`WeightsError::Io`] if the system refuses.
    pub fn finish(self) -> Result<()> {
        if let Some(name) = self.pending.into_keys().next() {
            return Err(WeightsError::Missing { name });
        }
        files::settle(self.file, &self.path).map_err(|source| WeightsError::Io { path: self.path, source })
    }
}

impl Slot {
    fn accept(&self, tensor: &RawTensor) -> Result<()> {
        let TensorInfo { name, dtype, shape } = &self.info;
        if (&tensor.dtype, &tensor.shape) == (dtype, shape) && tensor.bytes.len() as u64 == self.size {
            return Ok(());
        }
        let (found, extents, bytes) = (tensor.dtype, &tensor.shape, tensor.bytes.len());
        let reason = format!("announced as {dtype:?} {shape:?}, given {found:?} {extents:?} in {bytes} bytes");
        Err(WeightsError::BadTensor { name: name.clone(), reason })
    }
}

fn place(tensors: &[TensorInfo]) -> Result<Vec<Slot>> {
    let mut infos: Vec<&TensorInfo> = tensors.iter().collect();
    infos.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
    let refuse = |info: &TensorInfo, reason: &str| {
        Err(WeightsError::BadTensor { name: info.name.clone(), reason: reason.to_owned() })
    };
    let mut slots: Vec<Slot> = Vec::new();
    let mut names = std::collections::BTreeSet::new();
    for info in infos {
        let offset = slots.last().map_or(0, |last| last.offset + last.size);
        match byte_count(info.dtype, &info.shape) {
            _ if !names.insert(&info.name) => return refuse(info, "announced twice"),
            Some(size) => slots.push(Slot { info: info.clone(), offset, size }),
            None => return refuse(info, "its size is no whole number of bytes"),
        }
    }
    Ok(slots)
}

fn header(slots: &[Slot], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut object = Map::new();
    if !metadata.is_empty() {
        object.insert("__metadata__".to_owned(), json!(metadata));
    }
    for Slot { info, offset, size } in slots {
        let entry = json!({"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, offset + size]});
        object.insert(info.name.clone(), entry);
    }
    let mut text = Value::Object(object).to_string();
    let padding = text.len().next_multiple_of(ALIGNMENT) - text.len();
    text.extend(std::iter::repeat_n(' ', padding));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn begin(path: &Path, header: &[u8], size: u64) -> io::Result<NamedTempFile> {
    let mut file = files::beside(path)?;
    file.write_all(header)?;
    file.as_file().set_len(size)?;
    Ok(file)
}
