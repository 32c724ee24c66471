//! [`GgufTensor`]: one entry of a GGUF file's list of tensors, parsed and checked by itself. What depends on the other
//! tensors or the file's size is checked in [`super::read`].

use super::format::GgufType;
use super::reader::GgufReader;
use crate::Result;
use crate::error::{Validated, printed};
use crate::header::HeaderEntry;
use crate::storage_view::{FileRange, StorageView};
use std::collections::BTreeMap;

/// The specification says 4; files of video models have 5.
const MOST_DIMENSIONS: u64 = 5;

/// One tensor of the list.
#[derive(Debug)]
pub(super) struct GgufTensor {
    pub name: String,
    /// The name of its type in GGUF.
    pub format: &'static str,
    pub stored: GgufType,
    shape: Vec<usize>,
    /// Where its values begin, counted from the beginning of the file's values.
    pub offset: u64,
    /// Bytes of its values in the file.
    pub size: u64,
    /// Bytes of its values once dequantised.
    unpacked: u64,
}

impl GgufTensor {
    /// Reads the next tensor of the list. `shapes` are the original shapes from the metadata, by name.
    pub fn read(reader: &mut GgufReader, shapes: &mut BTreeMap<String, Vec<u64>>) -> Result<Self> {
        let name = reader.name()?;
        reader.enter(format!("tensor {}", printed(&name)));
        let mut dimensions = dimensions(reader)?;
        let (format, stored) = GgufType::numbered(reader.number(4)?).map_err(|reason| reader.bad(reason))?;
        let offset = reader.number(8)?;
        let (size, unpacked) = sizes(&dimensions, format, stored).map_err(|reason| reader.bad(reason))?;
        // GGUF lists the innermost dimension first, everything else here the outermost.
        dimensions.reverse();
        if let Some(original) = shapes.remove(&name) {
            dimensions = original_shape(&dimensions, original).map_err(|reason| reader.bad(reason))?;
        }
        let shape = dimensions.into_iter().map(|dimension| dimension as usize).collect();
        Ok(Self { name, format, stored, shape, offset, size, unpacked })
    }

    /// Its header entry, where `start` is the beginning of the file's values.
    pub fn into_entry(self, start: u64) -> HeaderEntry {
        let start = start + self.offset;
        let record =
            FileRange { bytes: start..start + self.size, size: self.unpacked, compression: self.stored.compression() };
        HeaderEntry { dtype: self.stored.dtype(), shape: self.shape, view: StorageView::of(record) }
    }
}

/// A tensor's dimensions, innermost first.
fn dimensions(reader: &mut GgufReader) -> Result<Vec<u64>> {
    let count = reader.number(4)?;
    if count > MOST_DIMENSIONS {
        return Err(reader.bad(format!("{count} dimensions, more than the {MOST_DIMENSIONS} allowed")));
    }
    let dimensions = (0..count).map(|_| reader.number(8)).collect::<Result<Vec<_>>>()?;
    if dimensions.contains(&0) {
        return Err(reader.bad(format!("a dimension of 0 in {dimensions:?}: the file is damaged")));
    }
    Ok(dimensions)
}

/// Bytes of a tensor in the file and once dequantised. Every row must be whole blocks.
fn sizes(dimensions: &[u64], format: &str, stored: GgufType) -> Validated<(u64, u64)> {
    let (values, bytes) = stored.block();
    let row = dimensions.first().copied().unwrap_or(1);
    if row % values != 0 {
        return Err(format!("rows of {row} values are not a multiple of the {values} in a block of {format}"));
    }
    let width = stored.dtype().bitsize() as u64 / 8;
    let counted =
        element_count(dimensions).and_then(|all| Some(((all / values).checked_mul(bytes)?, all.checked_mul(width)?)));
    counted.ok_or_else(|| format!("the size of {dimensions:?} in {format} cannot be counted in bytes"))
}

fn element_count(dimensions: &[u64]) -> Option<u64> {
    dimensions.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension))
}

fn original_shape(dimensions: &[u64], original: Vec<u64>) -> Validated<Vec<u64>> {
    match element_count(dimensions) == element_count(&original) {
        true => Ok(original),
        false => Err(format!("its original shape {original:?} does not hold as many values as {dimensions:?}")),
    }
}
