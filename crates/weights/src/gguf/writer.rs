//! [`write_gguf`]: writes a GGUF file of version 3, one piece of a tensor at a time.

use super::format::GgufType;
use super::metadata::{I32, LIST, SHAPE_KEY, TEXT, U32};
use crate::error::Result;
use crate::files;
use crate::stream::{Digest, HashingWriter};
use crate::writer::begin;
use crate::{TensorInfo, WeightsError};
use candle_core::quantized::GgmlDType;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Tensors begin at multiples of this, which is the alignment of files that state none.
const ALIGNMENT: u64 = 32;
/// ggml's tensors have no more dimensions; those of others are written flat, with their shape in the metadata.
const MOST_DIMENSIONS: usize = 4;
/// The longest name that stable-diffusion.cpp and ComfyUI-GGUF read.
const LONGEST_NAME: usize = 127;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufEntry {
    /// Its name and shape, and the dtype of its values if they are not in blocks.
    pub info: TensorInfo,
    /// The format of its blocks, of which rows are a whole number; `None` for plain values.
    pub blocks: Option<GgmlDType>,
}

/// Takes the bytes of a tensor, in order and in pieces of any size.
pub struct GgufSink<'a> {
    stream: &'a HashingWriter,
    sent: u64,
}

impl GgufSink<'_> {
    /// Writes the next bytes.
    pub fn send(&mut self, bytes: Vec<u8>) {
        self.sent += bytes.len() as u64;
        self.stream.send(bytes);
    }
}

impl GgufEntry {
    fn format(&self) -> GgufType {
        self.blocks.map_or(GgufType::Plain(self.info.dtype), GgufType::Blocks)
    }

    /// Its bytes in the file.
    ///
    /// # Errors
    /// Its dtype is none of GGUF, or its rows are no whole number of blocks.
    pub fn byte_count(&self) -> Result<u64> {
        let (values, bytes) = self.format().block();
        let row = self.info.shape.last().copied().unwrap_or(1) as u64;
        if !row.is_multiple_of(values) {
            return Err(self.bad(format!("expected rows of a multiple of {values} values, found {row}")));
        }
        let size = self.info.shape.iter().try_fold(bytes, |size, extent| size.checked_mul(*extent as u64));
        size.map(|size| size / values).ok_or_else(|| self.bad("it is too large to count its bytes".to_owned()))
    }

    /// Dimensions as GGUF lists them, the innermost first.
    fn dimensions(&self) -> Vec<u64> {
        match self.info.shape.len() {
            0..=MOST_DIMENSIONS => self.info.shape.iter().rev().map(|extent| *extent as u64).collect(),
            _ => vec![self.info.element_count()],
        }
    }

    fn number(&self) -> Result<u32> {
        let found = self.format().number().filter(|_| self.info.name.len() <= LONGEST_NAME);
        found.ok_or_else(|| {
            self.bad(format!("GGUF has no type for {:?}, or its name is longer than {LONGEST_NAME}", self.info.dtype))
        })
    }

    fn bad(&self, reason: String) -> WeightsError {
        WeightsError::BadTensor { name: self.info.name.clone(), reason }
    }
}

/// Writes `entries` to `path` in order, with `texts` as metadata, and returns the file's digest. `read` sends the bytes of one
/// entry after another.
///
/// # Errors
/// Errors of `read`; [`WeightsError::BadTensor`] for repeated names, dtypes that GGUF does not have, and where `read` sends
/// more or fewer bytes than an entry has; [`WeightsError::Io`] if writing fails. `path` is then unchanged.
pub fn write_gguf<E: From<WeightsError>>(
    path: impl AsRef<Path>,
    entries: &[GgufEntry],
    texts: &BTreeMap<String, String>,
    mut read: impl FnMut(&GgufEntry, &mut GgufSink) -> std::result::Result<(), E>,
) -> std::result::Result<Digest, E> {
    let path = path.as_ref();
    let io = |source| WeightsError::Io { path: path.to_owned(), source };
    let (header, size) = header(entries, texts)?;
    let (file, stream) = begin(path, header.len() as u64 + size).map_err(io)?;
    stream.send(header);
    for entry in entries {
        if stream.broken() {
            break;
        }
        let mut sink = GgufSink { stream: &stream, sent: 0 };
        read(entry, &mut sink)?;
        let (found, expected) = (sink.sent, entry.byte_count()?);
        if found != expected {
            return Err(entry.bad(format!("expected {expected} bytes, found {found}")).into());
        }
        stream.send(vec![0; (expected.next_multiple_of(ALIGNMENT) - expected) as usize]);
    }
    let digest = stream.finish().map_err(io)?;
    files::persist(file, path).map_err(io)?;
    Ok(digest)
}

/// Everything before the values, and how many bytes these take.
fn header(entries: &[GgufEntry], texts: &BTreeMap<String, String>) -> Result<(Vec<u8>, u64)> {
    let mut header = HeaderBytes::default();
    let flat: Vec<&GgufEntry> = entries.iter().filter(|entry| entry.info.shape.len() > MOST_DIMENSIONS).collect();
    header.0.extend(super::MAGIC);
    header.u32(3);
    header.u64(entries.len() as u64);
    header.u64((1 + texts.len() + flat.len()) as u64);
    header.key("general.quantization_version", U32);
    header.u32(2);
    for (key, text) in texts {
        header.key(key, TEXT);
        header.text(text);
    }
    for GgufEntry { info, .. } in flat {
        header.key(&format!("{SHAPE_KEY}{}", info.name), LIST);
        header.u32(I32 as u32);
        header.u64(info.shape.len() as u64);
        info.shape.iter().for_each(|extent| header.u32(*extent as u32));
    }
    let (mut offset, mut names) = (0, BTreeSet::new());
    for entry in entries {
        if !names.insert(&entry.info.name) {
            return Err(entry.bad("the name is given twice".to_owned()));
        }
        let dimensions = entry.dimensions();
        header.text(&entry.info.name);
        header.u32(dimensions.len() as u32);
        dimensions.into_iter().for_each(|extent| header.u64(extent));
        header.u32(entry.number()?);
        header.u64(offset);
        offset += entry.byte_count()?.next_multiple_of(ALIGNMENT);
    }
    header.0.resize(header.0.len().next_multiple_of(ALIGNMENT as usize), 0);
    Ok((header.0, offset))
}

#[derive(Default)]
struct HeaderBytes(Vec<u8>);

impl HeaderBytes {
    fn u32(&mut self, number: u32) {
        self.0.extend(number.to_le_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.0.extend(number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u64(text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u64) {
        self.text(key);
        self.u32(kind as u32);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Checkpoint, Dtype, TensorSource as _};

    fn entry(name: &str, dtype: Dtype, shape: &[usize], blocks: Option<GgmlDType>) -> GgufEntry {
        GgufEntry { info: TensorInfo { name: name.to_owned(), dtype, shape: shape.to_vec() }, blocks }
    }

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let entries = [
            entry("a.weight", Dtype::F32, &[2, 64], Some(GgmlDType::Q8_0)),
            entry("b.bias", Dtype::BF16, &[3], None),
            entry("c", Dtype::F32, &[1, 1, 1, 2, 1, 2, 1], None),
        ];
        let texts = BTreeMap::from([("general.architecture".to_owned(), "flux".to_owned())]);
        let bytes = |entry: &GgufEntry| (0..entry.byte_count().unwrap()).map(|at| at as u8).collect::<Vec<u8>>();
        write_gguf(&path, &entries, &texts, |entry, sink| {
            let mut first = bytes(entry);
            let rest = first.split_off(2);
            sink.send(first);
            sink.send(rest);
            Ok::<(), WeightsError>(())
        })
        .unwrap();
        let read = Checkpoint::open(&path).unwrap();
        assert_eq!(read.metadata()["general.architecture"], "flux");
        for GgufEntry { info, .. } in &entries {
            assert_eq!(&read.info(&info.name).unwrap(), info);
        }
        assert_eq!(read.read("b.bias").unwrap().bytes, bytes(&entries[1]));
        let rows = read.quantized_rows("a.weight", 0..2).unwrap().unwrap();
        assert_eq!(rows.into_bytes(), bytes(&entries[0]));
    }

    #[test]
    fn what_gguf_cannot_hold_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let write = |entries: &[GgufEntry]| {
            let nothing = |_: &GgufEntry, _: &mut GgufSink| Ok::<(), WeightsError>(());
            write_gguf(&path, entries, &BTreeMap::new(), nothing).unwrap_err().to_string()
        };
        let rows = write(&[entry("a", Dtype::F32, &[2, 33], Some(GgmlDType::Q8_0))]);
        assert!(rows.contains("expected rows of a multiple of 32 values, found 33"), "{rows}");
        let dtype = write(&[entry("a", Dtype::BOOL, &[2], None)]);
        assert!(dtype.contains("GGUF has no type for BOOL"), "{dtype}");
        let twice = write(&[entry("a", Dtype::F32, &[2], None), entry("a", Dtype::F32, &[2], None)]);
        assert!(twice.contains("given twice"), "{twice}");
        let short = write(&[entry("a", Dtype::F32, &[2], None)]);
        assert!(short.contains("expected 8 bytes, found 0") && !path.exists(), "{short}");
    }
}
