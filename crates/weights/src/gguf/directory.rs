//! [`GgufTensor`]: what the directory of a GGUF file says of one tensor, judged by itself. It knows no other tensor and not
//! the file's size.

use super::format::GgufType;
use super::reader::GgufReader;
use crate::Result;
use crate::error::{Validated, printed};
use crate::header::HeaderEntry;
use crate::storage_view::{FileRange, StorageView};
use std::collections::BTreeMap;

/// GGUF says 4; files of video models have 5.
const MOST_EXTENTS: u64 = 5;

/// One tensor of the directory.
#[derive(Debug)]
pub(super) struct GgufTensor {
    pub name: String,
    /// The number format's name in GGUF.
    pub format: &'static str,
    pub stored: GgufType,
    shape: Vec<usize>,
    /// Where its values begin, counted from where the first may.
    pub offset: u64,
    /// Bytes that they take in the file.
    pub size: u64,
    /// Bytes that they take as they are given.
    unpacked: u64,
}

impl GgufTensor {
    /// Reads the next tensor; `shapes` are those that the metadata give, by name.
    pub fn read(reader: &mut GgufReader, shapes: &mut BTreeMap<String, Vec<u64>>) -> Result<Self> {
        let name = reader.name()?;
        reader.enter(format!("tensor {}", printed(&name)));
        let mut extents = extents(reader)?;
        let (format, stored) = GgufType::numbered(reader.number(4)?).map_err(|reason| reader.bad(reason))?;
        let offset = reader.number(8)?;
        let (size, unpacked) = sizes(&extents, format, stored).map_err(|reason| reader.bad(reason))?;
        extents.reverse();
        if let Some(original) = shapes.remove(&name) {
            extents = reshaped(&extents, original).map_err(|reason| reader.bad(reason))?;
        }
        let shape = extents.into_iter().map(|extent| extent as usize).collect();
        Ok(Self { name, format, stored, shape, offset, size, unpacked })
    }

    /// Its entry, where the values of a file begin at `start`.
    pub fn placed(self, start: u64) -> HeaderEntry {
        let start = start + self.offset;
        let record = FileRange { bytes: start..start + self.size, size: self.unpacked, packing: self.stored.packing() };
        HeaderEntry { dtype: self.stored.dtype(), shape: self.shape, place: StorageView::of(record) }
    }
}

/// Extents, innermost first.
fn extents(reader: &mut GgufReader) -> Result<Vec<u64>> {
    let count = reader.number(4)?;
    if count > MOST_EXTENTS {
        return Err(reader.bad(format!("{count} extents, more than the {MOST_EXTENTS} allowed")));
    }
    let extents = (0..count).map(|_| reader.number(8)).collect::<Result<Vec<_>>>()?;
    if extents.contains(&0) {
        return Err(reader.bad(format!("an extent of 0 in {extents:?}: the file is damaged")));
    }
    Ok(extents)
}

/// Bytes of a tensor in the file and as it is given. Rows are whole blocks.
fn sizes(extents: &[u64], format: &str, stored: GgufType) -> Validated<(u64, u64)> {
    let (values, bytes) = stored.block();
    let row = extents.first().copied().unwrap_or(1);
    if row % values != 0 {
        return Err(format!("rows of {row} values are no multiple of the {values} that a block of {format} holds"));
    }
    let width = stored.dtype().bitsize() as u64 / 8;
    let counted = count(extents).and_then(|all| Some(((all / values).checked_mul(bytes)?, all.checked_mul(width)?)));
    counted.ok_or_else(|| format!("the size of {extents:?} in {format} cannot be counted in bytes"))
}

fn count(extents: &[u64]) -> Option<u64> {
    extents.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent))
}

fn reshaped(extents: &[u64], original: Vec<u64>) -> Validated<Vec<u64>> {
    match count(extents) == count(&original) {
        true => Ok(original),
        false => Err(format!("its original shape {original:?} does not hold as many values as {extents:?}")),
    }
}
