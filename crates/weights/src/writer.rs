//! [`write`]: a safetensors file, tensor by tensor, so that memory holds few of them. Reading, hashing and writing go on
//! at the same time.
//!
//! The file appears under its name only when whole.

use crate::header::byte_count;
use crate::stream::{Digest, HashingWriter};
use crate::{RawTensor, Result, TensorInfo, TensorSource, WeightsError, files};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use tempfile::NamedTempFile;

/// Data begin at a multiple of this, as the safetensors library has it.
const ALIGNMENT: usize = 8;

/// Writes all of `source` to `path`.
///
/// # Errors
/// The first tensor that cannot be read or written; `path` is then as it was.
pub fn save(path: impl AsRef<Path>, source: &dyn TensorSource, metadata: &BTreeMap<String, String>) -> Result<()> {
    write(path, &source.tensors(), metadata, |info| source.read(&info.name)).map(drop)
}

/// Writes `tensors` to `path`, asking `read` for one after another. Data are laid out by falling width of their number
/// format, then by name, which keeps every tensor aligned, and are asked for in this order.
///
/// # Errors
/// What `read` says; [`WeightsError::BadTensor`] for equal names, for a size that is no whole number of bytes and for
/// another number format or shape than announced; [`WeightsError::Io`] if the system refuses. `path` is then as it was.
pub fn write<E: From<WeightsError>>(
    path: impl AsRef<Path>,
    tensors: &[TensorInfo],
    metadata: &BTreeMap<String, String>,
    mut read: impl FnMut(&TensorInfo) -> std::result::Result<RawTensor, E>,
) -> std::result::Result<Digest, E> {
    let path = path.as_ref();
    let refused = |source| WeightsError::Io { path: path.to_owned(), source };
    let slots = place(tensors)?;
    let header = header(&slots, metadata);
    let size = header.len() as u64 + slots.iter().map(|slot| slot.size).sum::<u64>();
    let (file, stream) = begin(path, size).map_err(refused)?;
    stream.send(header);
    for slot in &slots {
        if stream.broken() {
            break;
        }
        let tensor = read(&slot.info)?;
        slot.accept(&tensor)?;
        stream.send(tensor.bytes);
    }
    let digest = stream.finish().map_err(refused)?;
    files::settle(file, path).map_err(refused)?;
    Ok(digest)
}

fn begin(path: &Path, size: u64) -> io::Result<(NamedTempFile, HashingWriter)> {
    let file = files::beside(path)?;
    files::reserve(file.as_file(), size)?;
    let stream = HashingWriter::into_file(file.as_file().try_clone()?);
    Ok((file, stream))
}

#[derive(Debug)]
struct Slot {
    info: TensorInfo,
    offset: u64,
    size: u64,
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
