//! [`TensorFile`]: one open file of a checkpoint, read by position. It knows no format.

use crate::storage_view::{FileRange, StorageView};
use crate::{Result, WeightsError, files};
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;

/// One file of a checkpoint.
#[derive(Debug)]
pub struct TensorFile {
    /// Its path; symbolic links are not resolved.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    file: File,
}

impl TensorFile {
    /// Opens a regular file; a device or pipe could block or never end.
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        let opened = std::fs::metadata(&path).and_then(|metadata| match metadata.is_file() {
            true => Ok((metadata.len(), File::open(&path)?)),
            false => Err(std::io::Error::other("not a regular file")),
        });
        match opened {
            Ok((size, file)) => Ok(Self { path, size, file }),
            Err(source) => Err(WeightsError::Io { path, source }),
        }
    }

    /// Reads `bytes`, which must lie within the file.
    pub(crate) fn read(&self, bytes: Range<u64>) -> Result<Vec<u8>> {
        self.with_path(files::read_at(&self.file, bytes.start, (bytes.end - bytes.start) as usize))
    }

    /// Reads the bytes `range` of the values that `view` covers, in row-major order.
    pub(crate) fn read_view(&self, view: &StorageView, range: Range<u64>) -> Result<Vec<u8>> {
        self.with_path(view.read(&self.file, range))
    }

    /// Reads the stored bytes `range` of the quantised blocks that `view` covers.
    pub(crate) fn read_blocks(&self, view: &StorageView, range: Range<u64>) -> Result<Vec<u8>> {
        self.with_path(view.read_blocks(&self.file, range))
    }

    /// Reads all of `record`, unpacked.
    pub(crate) fn read_record(&self, record: &FileRange) -> Result<Vec<u8>> {
        self.with_path(record.read(&self.file, 0..record.size))
    }

    /// A [`WeightsError::BadFile`] for this file.
    pub(crate) fn bad(&self, reason: String) -> WeightsError {
        WeightsError::BadFile { path: self.path.clone(), reason }
    }

    fn with_path(&self, read: std::io::Result<Vec<u8>>) -> Result<Vec<u8>> {
        read.map_err(|source| WeightsError::Io { path: self.path.clone(), source })
    }
}
