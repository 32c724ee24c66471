//! GGUF files: the metadata and the list of tensors, parsed and checked against the file's size.
//!
//! The format is that of <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3: metadata, a
//! list of tensors, then their values. Quantised tensors are presented as F32 and dequantised when they are read. No
//! tensor is read here, and names are opaque.

mod directory;
mod format;
mod metadata;
mod reader;
mod writer;

pub use writer::{GgufEntry, GgufSink, write_gguf};

use crate::error::printed;
use crate::header::Header;
use crate::{Result, TensorFile, WeightsError};
use candle_core::quantized::GgmlDType;
use directory::GgufTensor;
use format::GgufType;
use metadata::GgufMetadata;
use reader::GgufReader;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;

const MAGIC: &[u8] = b"GGUF";
/// The same limit as for torch files.
const MOST_TENSORS: u64 = 200_000;

/// Whether a file that starts with `beginning` is GGUF. Taken as the length of a safetensors header, the magic number
/// would exceed the limit, so a file cannot be both.
pub(crate) fn recognises(beginning: &[u8]) -> bool {
    beginning.starts_with(MAGIC)
}

/// Reads the metadata and the list of tensors of `file`.
pub(crate) fn read(file: &TensorFile) -> Result<Header> {
    let mut reader = GgufReader::new(file);
    let (tensors, keys) = counts(&mut reader)?;
    let mut metadata = GgufMetadata::read(&mut reader, keys)?;
    let mut listed = Vec::new();
    for number in 0..tensors {
        reader.enter(format!("tensor {number} of {tensors}"));
        listed.push(GgufTensor::read(&mut reader, &mut metadata.shapes)?);
    }
    let start = reader.position().next_multiple_of(metadata.alignment);
    check_offsets(file, &mut listed, start, metadata.alignment)?;
    let notes = quantisation_note(&listed).into_iter().collect();
    let mut header = Header { metadata: metadata.texts, notes, ..Header::default() };
    for tensor in listed {
        match header.tensors.entry(tensor.name.clone()) {
            Slot::Vacant(slot) => slot.insert(tensor.into_entry(start)),
            Slot::Occupied(_) => return Err(bad_tensor(file, &tensor.name, "is given twice")),
        };
    }
    Ok(header)
}

/// The name of a type of blocks in GGUF.
pub fn block_format_name(blocks: GgmlDType) -> &'static str {
    GgufType::name_of(blocks)
}

/// The type of blocks with this name, in letters of either case.
pub fn block_format_named(name: &str) -> Option<GgmlDType> {
    GgufType::blocks_named(name)
}

/// The format of blocks for rows of `columns` values where `format` is wanted: itself, or the one that llama.cpp takes if those
/// are no whole number of its blocks; `None` if they are none of either.
pub fn block_format_for(format: GgmlDType, columns: usize) -> Option<GgmlDType> {
    let fallback = match format {
        GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
        GgmlDType::Q4K => GgmlDType::Q5_0,
        GgmlDType::Q5K => GgmlDType::Q5_1,
        GgmlDType::Q6K => GgmlDType::Q8_0,
        other => other,
    };
    [format, fallback].into_iter().find(|format| columns.is_multiple_of(format.block_size()))
}

/// Reads the head of the file: (number of tensors, number of metadata keys).
fn counts(reader: &mut GgufReader) -> Result<(u64, u64)> {
    reader.take(MAGIC.len() as u64)?;
    match reader.number(4)? {
        2 | 3 => {}
        version if version & 0xffff == 0 && version != 0 => {
            return Err(reader.bad("a GGUF file of another byte order (big-endian): get the little-endian one"));
        }
        version => {
            let reason = format!("GGUF version {version}, expected 2 or 3: convert the file again");
            return Err(reader.bad(reason));
        }
    }
    let tensors = reader.number(8)?;
    let keys = reader.number(8)?;
    if tensors > MOST_TENSORS {
        return Err(reader.bad(format!("it claims {tensors} tensors, more than the {MOST_TENSORS} allowed")));
    }
    Ok((tensors, keys))
}

/// Sorts the tensors by offset. They must lie within the file, begin at multiples of the alignment and not overlap.
/// Gaps are allowed: the specification does not forbid them.
fn check_offsets(file: &TensorFile, listed: &mut [GgufTensor], start: u64, alignment: u64) -> Result<()> {
    listed.sort_by_key(|tensor| tensor.offset);
    let mut free = 0;
    for GgufTensor { name, offset, size, .. } in listed {
        if *offset % alignment != 0 {
            let reason = format!("begins at {offset}, which is not a multiple of the file's alignment {alignment}");
            return Err(bad_tensor(file, name, reason));
        }
        if *offset < free {
            let reason = format!("overlaps the tensor before it: it begins at {offset}, expected {free} or more");
            return Err(bad_tensor(file, name, reason));
        }
        let end = offset.checked_add(*size).and_then(|end| Some((end, end.checked_add(start)?)));
        free = match end {
            Some((end, in_file)) if in_file <= file.size => end,
            _ => {
                let reason = format!(
                    "takes {size} bytes from {offset}, past the file's end: it is cut short, download it again"
                );
                return Err(bad_tensor(file, name, reason));
            }
        };
    }
    Ok(())
}

/// A note on the quantised types, if the file has any.
fn quantisation_note(listed: &[GgufTensor]) -> Option<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for tensor in listed.iter().filter(|tensor| matches!(tensor.stored, GgufType::Blocks(_))) {
        *counts.entry(tensor.format).or_default() += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(format, count)| format!("{count} of {format}")).collect();
    (!counts.is_empty()).then(|| format!("quantised tensors: {}", counts.join(", ")))
}

fn bad_tensor(file: &TensorFile, name: &str, reason: impl std::fmt::Display) -> WeightsError {
    file.bad(format!("tensor {} {reason}", printed(name)))
}
