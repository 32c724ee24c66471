//! [`Header`]: the directory at the head of a safetensors file, read and judged against the file's size.
//!
//! Nothing is allocated on the word of the file alone. It reads no tensor. The rules are those of
//! <https://github.com/huggingface/safetensors#format>, with equal names refused too.

use crate::json::{self, BoundedShape, UniqueKeys};
use crate::storage_view::StorageView;
use crate::{Dtype, Result, WeightsError, disguise, files};
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::Path;

const LENGTH_BYTES: u64 = 8;
const LONGEST_HEADER: u64 = 100_000_000;
const METADATA: &str = "__metadata__";

/// Where a tensor lies in its file and what it is.
#[derive(Debug, Clone)]
pub(crate) struct HeaderEntry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub place: StorageView,
}

/// A file's directory.
#[derive(Debug, Default)]
pub(crate) struct Header {
    pub metadata: BTreeMap<String, String>,
    pub tensors: BTreeMap<String, HeaderEntry>,
    /// What was chosen of the file and what was left out, for a person.
    pub notes: Vec<String>,
}

impl Header {
    /// Reads and checks the header of `file`, which has `size` bytes; `path` is for messages.
    pub fn read(path: &Path, file: &File, size: u64) -> Result<Self> {
        let bad = |reason| WeightsError::BadFile { path: path.to_owned(), reason };
        let io = |source| WeightsError::Io { path: path.to_owned(), source };
        let beginning = files::read_at(file, 0, size.min(64) as usize).map_err(io)?;
        let length = header_length(&beginning, size).map_err(bad)?;
        let text = files::read_at(file, LENGTH_BYTES, length as usize).map_err(io)?;
        let raw: RawHeader = serde_json::from_slice(&text)
            .map_err(|error| bad(format!("the header is not what safetensors allows: {error}")))?;
        raw.judge(LENGTH_BYTES + length, size).map_err(bad)
    }
}

/// Bytes that `shape` of `dtype` takes, if they can be counted and are whole.
pub(crate) fn byte_count(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent as u64))?;
    let bits = elements.checked_mul(dtype.bitsize() as u64)?;
    (bits % 8 == 0).then_some(bits / 8)
}

fn header_length(beginning: &[u8], size: u64) -> std::result::Result<u64, String> {
    let recognised = || disguise::recognise(beginning);
    let Some(claim) = beginning.first_chunk::<8>() else {
        let plain = || format!("the file has {size} bytes, too few for a header: download it again");
        return Err(recognised().unwrap_or_else(plain));
    };
    let length = u64::from_le_bytes(*claim);
    if length > LONGEST_HEADER {
        let plain = || {
            format!(
                "neither of safetensors nor of torch.save: it claims a header of {length} bytes (allowed {LONGEST_HEADER})"
            )
        };
        return Err(recognised().unwrap_or_else(plain));
    }
    if length > size - LENGTH_BYTES {
        let plain = || format!("the header of {length} bytes goes past the file's end at {size}: it is cut short");
        return Err(recognised().unwrap_or_else(plain));
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
    metadata: Option<UniqueKeys<String>>,
    tensors: UniqueKeys<RawEntry>,
}

impl RawHeader {
    /// The tensors must tile the bytes from `start` to `size` without gap or overlap.
    fn judge(self, start: u64, size: u64) -> std::result::Result<Header, String> {
        let mut order: Vec<(&String, &RawEntry)> = self.tensors.0.iter().collect();
        order.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut end = 0;
        for (name, entry) in order {
            end = follow(name, entry, end)?;
        }
        judge_end(end, size - start)?;
        let tensors = self.tensors.0.into_iter().map(|(name, raw)| (name, raw.placed(start))).collect();
        Ok(Header { metadata: self.metadata.unwrap_or_default().0, tensors, notes: Vec::new() })
    }
}

impl RawEntry {
    fn placed(self, start: u64) -> HeaderEntry {
        let (begin, end) = self.data_offsets;
        HeaderEntry { dtype: self.dtype, shape: self.shape.0, place: StorageView::whole(start + begin..start + end) }
    }
}

fn follow(name: &str, entry: &RawEntry, previous_end: u64) -> std::result::Result<u64, String> {
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

fn judge_end(end: u64, present: u64) -> std::result::Result<(), String> {
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
