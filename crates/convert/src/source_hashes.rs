//! [`SourceHashes`]: the hashes of the files that a model is made from, computed while the model is written.

use crate::Result;
use clearform_portable_model::SourceRecord;
use clearform_weights::{Checkpoint, digest};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

/// The hashes of a checkpoint's files, computed on a thread of their own if the system starts one.
#[derive(Debug)]
pub struct SourceHashes {
    paths: Vec<PathBuf>,
    thread: Option<JoinHandle<Result<Vec<SourceRecord>>>>,
}

impl SourceHashes {
    /// Starts to hash the files of `checkpoint`.
    pub fn start(checkpoint: &Checkpoint) -> Self {
        let paths: Vec<PathBuf> = checkpoint.files().iter().map(|file| file.path.clone()).collect();
        let hashed = paths.clone();
        Self { thread: thread::Builder::new().spawn(move || source_records(hashed)).ok(), paths }
    }

    /// Waits for the hashes.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn wait(self) -> Result<Vec<SourceRecord>> {
        match self.thread {
            Some(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            None => source_records(self.paths),
        }
    }
}

fn source_records(paths: Vec<PathBuf>) -> Result<Vec<SourceRecord>> {
    paths.into_iter().map(source_record).collect()
}

/// Name and hash of the file at `path`.
///
/// # Errors
/// It cannot be read.
pub fn source_record(path: PathBuf) -> Result<SourceRecord> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(SourceRecord { name, sha256: digest(&path)?.sha256 })
}
