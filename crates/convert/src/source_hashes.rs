//! [`SourceHashes`]: the hashes of the files that a model is made from, computed while the model is written.

use crate::Result;
use clearform_portable_model::SourceRecord;
use clearform_weights::{Checkpoint, digest};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

/// The hashes of a checkpoint's files, computed on a thread of their own.
#[derive(Debug)]
pub struct SourceHashes(JoinHandle<Result<Vec<SourceRecord>>>);

impl SourceHashes {
    /// Starts to hash the files of `checkpoint`.
    pub fn start(checkpoint: &Checkpoint) -> Self {
        let paths: Vec<PathBuf> = checkpoint.files().iter().map(|file| file.path.clone()).collect();
        Self(thread::spawn(move || paths.into_iter().map(source_record).collect()))
    }

    /// Waits for the hashes.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn wait(self) -> Result<Vec<SourceRecord>> {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Name and hash of the file at `path`.
///
/// # Errors
/// It cannot be read.
pub fn source_record(path: PathBuf) -> Result<SourceRecord> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(SourceRecord { name, sha256: digest(&path)?.sha256 })
}
