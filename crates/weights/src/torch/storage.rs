//! [`TorchStorage`] and [`TorchTensor`]: storages and the views of them that are tensors, as a pickle describes them
//! and checked before anything is read.

use super::Validated;
use crate::Dtype;
use crate::header::{HeaderEntry, byte_count};
use crate::storage_view::{FileRange, StorageView};

/// A storage, which several tensors may share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TorchStorage<'a> {
    pub key: &'a str,
    /// The dtype of its elements; `None` for an untyped storage, whose tensors have their own.
    pub dtype: Option<Dtype>,
    pub bytes: u64,
}

/// A view of a storage.
#[derive(Debug, Clone)]
pub(super) struct TorchTensor {
    /// The index of the storage.
    pub storage: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Offset of the first value in bytes.
    start: u64,
    /// (size, stride in bytes) of each axis, outermost first.
    axes: Vec<(u64, u64)>,
}

/// A view as the pickle describes it; offset and strides are in elements.
#[derive(Debug)]
pub(super) struct ViewSpec {
    pub dtype: Dtype,
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

impl ViewSpec {
    /// The view of `storage`, whose index is `index`; an error if it goes past the storage's end.
    pub fn of(self, storage: &TorchStorage, index: usize) -> Validated<TorchTensor> {
        let Self { dtype, offset, shape, strides } = self;
        if shape.len() != strides.len() {
            return Err(format!("a tensor of {} dimensions and {} strides", shape.len(), strides.len()));
        }
        let width = width(dtype);
        let too_large = || {
            let TorchStorage { key, bytes, .. } = storage;
            format!("a tensor of {shape:?} from element {offset} goes past the {bytes} bytes of storage {key:?}")
        };
        let start = offset.checked_mul(width).ok_or_else(too_large)?;
        let strides_in_bytes = strides.iter().map(|stride| stride.checked_mul(width)).collect::<Option<Vec<_>>>();
        let axes: Vec<(u64, u64)> = shape.iter().copied().zip(strides_in_bytes.ok_or_else(too_large)?).collect();
        let shape = shape.iter().map(|&size| usize::try_from(size).ok()).collect::<Option<Vec<_>>>();
        let shape = shape.ok_or_else(too_large)?;
        byte_count(dtype, &shape).ok_or_else(too_large)?;
        end(start, &axes, width).filter(|&end| end <= storage.bytes).ok_or_else(too_large)?;
        Ok(TorchTensor { storage: index, dtype, shape, start, axes })
    }
}

impl TorchTensor {
    /// Its header entry, where `record` is its storage.
    pub fn entry(&self, record: &FileRange) -> HeaderEntry {
        let view = StorageView::strided(record.clone(), self.start, self.axes.clone(), width(self.dtype));
        HeaderEntry { dtype: self.dtype, shape: self.shape.clone(), view }
    }
}

/// Bytes of one element.
pub(super) fn width(dtype: Dtype) -> u64 {
    dtype.bitsize() as u64 / 8
}

/// The first byte after the last value; 0 for a tensor without values, which fits any storage.
fn end(start: u64, axes: &[(u64, u64)], width: u64) -> Option<u64> {
    if axes.iter().any(|&(size, _)| size == 0) {
        return Some(0);
    }
    let last = axes.iter().try_fold(start, |at, &(size, stride)| at.checked_add((size - 1).checked_mul(stride)?));
    last?.checked_add(width)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn views_past_their_storage_are_refused() {
        const HUGE: u64 = 1 << 62;
        let storage = TorchStorage { key: "0", dtype: Some(Dtype::F32), bytes: 24 };
        let cases: [(u64, &[u64], &[u64], bool); 12] = [
            (0, &[2, 3], &[3, 1], true),
            (0, &[3, 2], &[1, 3], true),
            (5, &[], &[], true),
            (6, &[], &[], false),
            (4, &[2], &[1], true),
            (5, &[2], &[1], false),
            (0, &[4], &[0], true),
            (HUGE, &[1], &[1], false),
            (0, &[2], &[HUGE], false),
            (0, &[HUGE], &[0], false),
            (0, &[HUGE, 0], &[1, 1], true),
            (0, &[2, 3], &[1], false),
        ];
        for (offset, shape, strides, expected) in cases {
            let spec = ViewSpec { dtype: Dtype::F32, offset, shape: shape.to_vec(), strides: strides.to_vec() };
            assert_eq!(spec.of(&storage, 0).is_ok(), expected, "{offset} {shape:?} {strides:?}");
        }
    }
}
