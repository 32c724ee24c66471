//! [`Header`]: the header of a safetensors file, parsed and checked against the file's size.
//!
//! No tensor is read, and no length in the file is trusted before it is checked. The rules are those of
//! <https://github.com/huggingface/safetensors#format>; in addition, repeated names are refused.

use crate::error::Validated;
use crate::json::{self, BoundedShape, UniqueKeys};
use crate::storage_view::StorageView;
use crate::{Dtype, Result, TensorFile, not_weights};
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// The file begins with the header's length in so many bytes.
const LENGTH_BYTES: u64 = 8;
/// The limit of the safetensors library.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes of the beginning that [`not_weights`] looks at.
const BEGINNING: u64 = 64;
const METADATA: &str = "__metadata__";

/// A tensor's dtype and shape, and where its values are in the file.
#[derive(Debug, Clone)]
pub(crate) struct HeaderEntry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub view: StorageView,
}

/// The description of all tensors in a file, whatever its format.
#[derive(Debug, Default)]
pub(crate) struct Header {
    pub metadata: BTreeMap<String, String>,
    pub tensors: BTreeMap<String, HeaderEntry>,
    /// What was chosen from the file and what was left out.
    pub notes: Vec<String>,
}

impl Header {
    /// Reads and checks the header of the safetensors file `file`.
    pub fn read(file: &TensorFile) -> Result<Self> {
        let bad = |reason| file.bad(reason);
        let beginning = file.read(0..file.size.min(BEGINNING))?;
        let length = header_length(&beginning, file.size).map_err(bad)?;
        let text = file.read(LENGTH_BYTES..LENGTH_BYTES + length)?;
        let raw: RawHeader = serde_json::from_slice(&text)
            .map_err(|error| bad(format!("the header is not what safetensors allows: {error}")))?;
        raw.validate(LENGTH_BYTES + length, file.size).map_err(bad)
    }
}

/// Bytes of a tensor of `shape` and `dtype`; `None` if their number overflows or is not whole.
pub(crate) fn byte_count(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64))?;
    let bits = elements.checked_mul(dtype.bitsize() as u64)?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// The length of the header, or what the file is instead of a safetensors file.
fn header_length(beginning: &[u8], size: u64) -> Validated<u64> {
    check_length(beginning, size).map_err(|reason| not_weights::describe(beginning).unwrap_or(reason))
}

fn check_length(beginning: &[u8], size: u64) -> Validated<u64> {
    let Some(length) = beginning.first_chunk::<8>() else {
        return Err(format!("the file has {size} bytes, too few for a header: download it again"));
    };
    let length = u64::from_le_bytes(*length);
    if length > LONGEST_HEADER {
        let claim = format!("it claims a header of {length} bytes, at most {LONGEST_HEADER} are allowed");
        return Err(format!("not a safetensors or torch.save file: {claim}"));
    }
    if length > size - LENGTH_BYTES {
        return Err(format!("the header of {length} bytes goes past the file's end at {size}: it is cut short"));
    }
    Ok(length)
}

#[derive(Debug, Deserialize)]
struct RawEntry {
    dtype: Dtype,
    shape: BoundedShape,
    data_offsets: (u64, u64),
}

#[derive(Debug, Default)]
struct RawHeader {
    /// `None` until the key is read, whose value may be null.
    metadata: Option<Option<UniqueKeys<String>>>,
    tensors: UniqueKeys<RawEntry>,
}

impl RawHeader {
    /// The tensors must cover the bytes from `start` to `size` without gap or overlap.
    fn validate(self, start: u64, size: u64) -> Validated<Header> {
        let mut order: Vec<(&String, &RawEntry)> = self.tensors.0.iter().collect();
        order.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut end = 0;
        for (name, entry) in order {
            end = check_follows(name, entry, end)?;
        }
        check_end(end, size - start)?;
        let tensors = self.tensors.0.into_iter().map(|(name, raw)| (name, raw.placed(start))).collect();
        Ok(Header { metadata: self.metadata.flatten().unwrap_or_default().0, tensors, notes: Vec::new() })
    }
}

impl RawEntry {
    fn placed(self, start: u64) -> HeaderEntry {
        let (begin, end) = self.data_offsets;
        HeaderEntry { dtype: self.dtype, shape: self.shape.0, view: StorageView::whole(start + begin..start + end) }
    }
}

/// The end of a tensor that must begin at `previous_end` and have the size of its shape.
fn check_follows(name: &str, entry: &RawEntry, previous_end: u64) -> Validated<u64> {
    let (begin, end) = entry.data_offsets;
    if begin != previous_end {
        let what = if begin < previous_end { "overlaps the tensor before it" } else { "leaves a hole before it" };
        return Err(format!("tensor {name:?} {what}: it begins at {begin}, expected {previous_end}"));
    }
    let RawEntry { dtype, shape: BoundedShape(shape), .. } = entry;
    let expected = byte_count(*dtype, shape)
        .ok_or_else(|| format!("tensor {name:?}: the size of {shape:?} in {dtype:?} cannot be counted in bytes"))?;
    match end.checked_sub(begin) {
        Some(found) if found == expected => Ok(end),
        _ => Err(format!("tensor {name:?}: {shape:?} in {dtype:?} takes {expected} bytes, found {begin}..{end}")),
    }
}

fn check_end(end: u64, present: u64) -> Validated<()> {
    if end > present {
        let short = end - present;
        return Err(format!("cut short by {short} bytes (tensors take {end}, found {present}): download it again"));
    }
    if end < present {
        let extra = present - end;
        return Err(format!("{extra} bytes follow the last tensor (tensors take {end}, found {present})"));
    }
    Ok(())
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
        let mut header = RawHeader::default();
        while let Some(name) = map.next_key::<String>()? {
            json::check_length(&name)?;
            if name != METADATA {
                let entry = map.next_value();
                let entry = entry.map_err(|error| A::Error::custom(format!("tensor {name:?}: {error}")))?;
                header.tensors.put(name, entry)?;
            } else if header.metadata.replace(map.next_value()?).is_some() {
                return Err(A::Error::custom(format!("key {METADATA:?} is given twice")));
            }
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_bytes_of_every_width() {
        assert_eq!(byte_count(Dtype::F32, &[3, 2]), Some(24));
        assert_eq!(byte_count(Dtype::BF16, &[]), Some(2));
        assert_eq!(byte_count(Dtype::F4, &[3]), None);
        assert_eq!(byte_count(Dtype::F4, &[4]), Some(2));
        assert_eq!(byte_count(Dtype::F64, &[usize::MAX, 2]), None);
        assert_eq!(byte_count(Dtype::U8, &[usize::MAX, 0]), Some(0));
    }
}
