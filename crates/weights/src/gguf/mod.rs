//! GGUF files: their directory read and judged against the file's size.
//!
//! The form is that of <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3: metadata, a list
//! of tensors, then their values. Tensors kept in blocks of quantised values are shown, and read, as the F32 that the
//! blocks stand for: nothing is lost that the file has. No tensor is read here, and names are opaque.

mod directory;
mod format;
mod metadata;
mod reader;

use crate::checkpoint::TensorFile;
use crate::error::printed;
use crate::header::Header;
use crate::{Result, WeightsError};
use candle_core::quantized::GgmlDType;
use directory::GgufTensor;
use format::GgufType;
use metadata::GgufMetadata;
use reader::GgufReader;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;

const MAGIC: &[u8] = b"GGUF";
/// As many as a torch file may hold.
const MOST_TENSORS: u64 = 200_000;

/// Whether a file that starts with `beginning` is for [`read`]. As the length of a safetensors header it is too much.
pub(crate) fn recognises(beginning: &[u8]) -> bool {
    beginning.starts_with(MAGIC)
}

/// Reads the directory of tensors of `file`.
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
    judge_places(file, &mut listed, start, metadata.alignment)?;
    let notes = dequantised(&listed).into_iter().collect();
    let mut header = Header { metadata: metadata.texts, notes, ..Header::default() };
    for tensor in listed {
        match header.tensors.entry(tensor.name.clone()) {
            Slot::Vacant(slot) => slot.insert(tensor.placed(start)),
            Slot::Occupied(_) => return Err(about(file, &tensor.name, "is given twice")),
        };
    }
    Ok(header)
}

/// What GGUF calls the format of these blocks.
pub(crate) fn name_of(blocks: GgmlDType) -> &'static str {
    GgufType::name_of(blocks)
}

/// The numbers of tensors and of metadata keys.
fn counts(reader: &mut GgufReader) -> Result<(u64, u64)> {
    reader.take(MAGIC.len() as u64)?;
    match reader.number(4)? {
        2 | 3 => {}
        version if version & 0xffff == 0 && version != 0 => {
            return Err(reader.bad("a GGUF file of another byte order (big-endian): get the little-endian one"));
        }
        version => {
            let reason = format!("version {version} of GGUF; versions 2 and 3 are read: make the file anew");
            return Err(reader.bad(reason));
        }
    }
    let (tensors, keys) = (reader.number(8)?, reader.number(8)?);
    if tensors > MOST_TENSORS {
        return Err(reader.bad(format!("it claims {tensors} tensors, more than the {MOST_TENSORS} allowed")));
    }
    Ok((tensors, keys))
}

/// Values must lie in the file, at multiples of the alignment, and no two tensors' may share bytes. They are sorted by
/// where they lie. Gaps are allowed, as the format does not forbid them.
fn judge_places(file: &TensorFile, listed: &mut [GgufTensor], start: u64, alignment: u64) -> Result<()> {
    listed.sort_by_key(|tensor| tensor.offset);
    let mut free = 0;
    for GgufTensor { name, offset, size, .. } in listed {
        if *offset % alignment != 0 {
            let reason = format!("begins at {offset}, which is no multiple of the file's alignment {alignment}");
            return Err(about(file, name, reason));
        }
        if *offset < free {
            return Err(about(file, name, format!("overlaps the tensor before it: it begins at {offset}, not {free}")));
        }
        let end = offset.checked_add(*size).and_then(|end| Some((end, end.checked_add(start)?)));
        free = match end {
            Some((end, in_file)) if in_file <= file.size => end,
            _ => {
                let reason = format!(
                    "takes {size} bytes from {offset}, past the file's end: it is cut short, download it again"
                );
                return Err(about(file, name, reason));
            }
        };
    }
    Ok(())
}

/// What a person should know of the formats that are not given as they are.
fn dequantised(listed: &[GgufTensor]) -> Option<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for tensor in listed.iter().filter(|tensor| matches!(tensor.stored, GgufType::Blocks(_))) {
        *counts.entry(tensor.format).or_default() += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(format, count)| format!("{count} of {format}")).collect();
    (!counts.is_empty()).then(|| format!("quantised tensors are read as F32: {}", counts.join(", ")))
}

fn about(file: &TensorFile, name: &str, reason: impl std::fmt::Display) -> WeightsError {
    file.bad(format!("tensor {} {reason}", printed(name)))
}
