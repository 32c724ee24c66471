//! [`write()`]: writes a safetensors file one tensor at a time, so that memory holds at most a few of them. Reading,
//! hashing and writing overlap.
//!
//! The file gets its name only when it is complete.

use crate::header::byte_count;
use crate::stream::{Digest, HashingWriter};
use crate::{RawTensor, Result, TensorInfo, TensorSource, WeightsError, files};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use tempfile::NamedTempFile;

/// The values begin at a multiple of this, as in files of the safetensors library.
const ALIGNMENT: usize = 8;

/// Writes all tensors of `source` to `path`.
///
/// # Errors
/// The first tensor that cannot be read or written; `path` is then unchanged.
pub fn save(path: impl AsRef<Path>, source: &dyn TensorSource, metadata: &BTreeMap<String, String>) -> Result<()> {
    write(path, &source.tensors(), metadata, |info| source.read(&info.name)).map(drop)
}

/// Writes `tensors` to `path` and returns the file's digest. Tensors are stored by decreasing width of their dtype,
/// then by name, which keeps each aligned; `read` is called for one after another in this order.
///
/// # Errors
/// Errors of `read`; [`WeightsError::BadTensor`] for repeated names, for a size that is not a whole number of bytes and
/// where `read` returns another dtype or shape than declared; [`WeightsError::Io`] if writing fails. `path` is then
/// unchanged.
pub fn write<E: From<WeightsError>>(
    path: impl AsRef<Path>,
    tensors: &[TensorInfo],
    metadata: &BTreeMap<String, String>,
    mut read: impl FnMut(&TensorInfo) -> std::result::Result<RawTensor, E>,
) -> std::result::Result<Digest, E> {
    let path = path.as_ref();
    let io = |source| WeightsError::Io { path: path.to_owned(), source };
    let slots = lay_out(tensors)?;
    let header = header(&slots, metadata);
    let size = header.len() as u64 + slots.iter().map(|slot| slot.size).sum::<u64>();
    let (file, stream) = begin(path, size).map_err(io)?;
    stream.send(header);
    for slot in &slots {
        if stream.broken() {
            break;
        }
        let tensor = read(&slot.info)?;
        slot.check(&tensor)?;
        stream.send(tensor.bytes);
    }
    let digest = stream.finish().map_err(io)?;
    files::persist(file, path).map_err(io)?;
    Ok(digest)
}

pub(crate) fn begin(path: &Path, size: u64) -> io::Result<(NamedTempFile, HashingWriter)> {
    let file = files::temporary_file_for(path)?;
    files::reserve(file.as_file(), size)?;
    let stream = HashingWriter::into_file(file.as_file().try_clone()?)?;
    Ok((file, stream))
}

/// A tensor's range among the values of the file.
#[derive(Debug)]
struct Slot {
    info: TensorInfo,
    offset: u64,
    size: u64,
}

impl Slot {
    fn check(&self, tensor: &RawTensor) -> Result<()> {
        let TensorInfo { name, dtype, shape } = &self.info;
        if (&tensor.dtype, &tensor.shape) == (dtype, shape) && tensor.bytes.len() as u64 == self.size {
            return Ok(());
        }
        let found = format!("{:?} {:?} in {} bytes", tensor.dtype, tensor.shape, tensor.bytes.len());
        let reason = format!("expected {dtype:?} {shape:?}, found {found}");
        Err(WeightsError::BadTensor { name: name.clone(), reason })
    }
}

/// Gives every tensor its range, in the order they are written.
fn lay_out(tensors: &[TensorInfo]) -> Result<Vec<Slot>> {
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
            _ if !names.insert(&info.name) => return refuse(info, "the name is given twice"),
            Some(size) => slots.push(Slot { info: info.clone(), offset, size }),
            None => return refuse(info, "its size is not a whole number of bytes"),
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
