//! [`TorchStorage`] and [`TorchTensor`]: what a pickle says of where values lie, judged before anything is read. The files
//! themselves are not known here.

use super::Validated;
use crate::Dtype;
use crate::header::{HeaderEntry, byte_count};
use crate::storage_view::{FileRange, StorageView};

/// A run of bytes that tensors share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TorchStorage<'a> {
    pub key: &'a str,
    /// What its elements are; `None` for bytes of which each tensor says itself what they are.
    pub dtype: Option<Dtype>,
    pub bytes: u64,
}

/// A view of a storage.
#[derive(Debug, Clone)]
pub(super) struct TorchTensor {
    /// The number of the storage.
    pub storage: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// The first value, in bytes.
    start: u64,
    /// Extents and strides in bytes, outermost first.
    axes: Vec<(u64, u64)>,
}

/// What the pickle says of a view, in elements.
#[derive(Debug)]
pub(super) struct ViewSpec {
    pub dtype: Dtype,
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

impl ViewSpec {
    /// The view of `storage`, which bears the number `index`, if the storage has every value of it.
    pub fn of(self, storage: &TorchStorage, index: usize) -> Validated<TorchTensor> {
        let Self { dtype, offset, shape, strides } = self;
        if shape.len() != strides.len() {
            return Err(format!("a tensor of {} extents and {} strides", shape.len(), strides.len()));
        }
        let width = width(dtype);
        let past = || {
            let TorchStorage { key, bytes, .. } = storage;
            format!("a tensor of {shape:?} from element {offset} goes past the {bytes} bytes of storage {key:?}")
        };
        let start = offset.checked_mul(width).ok_or_else(past)?;
        let scaled = strides.iter().map(|stride| stride.checked_mul(width)).collect::<Option<Vec<_>>>();
        let axes: Vec<(u64, u64)> = shape.iter().copied().zip(scaled.ok_or_else(past)?).collect();
        let shape = shape.iter().map(|&extent| usize::try_from(extent).ok()).collect::<Option<Vec<_>>>();
        let shape = shape.ok_or_else(past)?;
        byte_count(dtype, &shape).ok_or_else(past)?;
        end(start, &axes, width).filter(|&end| end <= storage.bytes).ok_or_else(past)?;
        Ok(TorchTensor { storage: index, dtype, shape, start, axes })
    }
}

impl TorchTensor {
    /// Where it lies, given where its storage does.
    pub fn placed(&self, record: &FileRange) -> HeaderEntry {
        let place = StorageView::strided(record.clone(), self.start, self.axes.clone(), width(self.dtype));
        HeaderEntry { dtype: self.dtype, shape: self.shape.clone(), place }
    }
}

/// Bytes of one value.
pub(super) fn width(dtype: Dtype) -> u64 {
    dtype.bitsize() as u64 / 8
}

/// The first byte after the last value; a tensor without values has none and ends where all begins.
fn end(start: u64, axes: &[(u64, u64)], width: u64) -> Option<u64> {
    if axes.iter().any(|&(extent, _)| extent == 0) {
        return Some(0);
    }
    let last = axes.iter().try_fold(start, |at, &(extent, stride)| at.checked_add((extent - 1).checked_mul(stride)?));
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
            let claim = ViewSpec { dtype: Dtype::F32, offset, shape: shape.to_vec(), strides: strides.to_vec() };
            assert_eq!(claim.of(&storage, 0).is_ok(), expected, "{offset} {shape:?} {strides:?}");
        }
    }
}
