//! Shared by the targets: a folder of files to open ([`ScratchFolder`]), reading what was opened, and opening a file for a
//! plugin ([`lend`]). Results are not judged: an error is as good as a checkpoint. Only a panic, a hang or too much memory is
//! wrong, and the fuzzer detects those.

pub mod lend;

// What file.rs of the host, which `lend` includes, finds in its own crate.
use clearform_plugin_host::{PluginError, Result};

use clearform_weights::{Checkpoint, TensorSource};
use std::path::PathBuf;
use std::sync::LazyLock;

/// Larger tensors are read only at their ends.
const MOST_READ: usize = 1 << 20;
const PIECE: usize = 16;

/// The scratch folder of this process.
pub static SCRATCH: LazyLock<ScratchFolder> = LazyLock::new(ScratchFolder::new);

/// A folder for the files that readers open.
pub struct ScratchFolder {
    folder: PathBuf,
}

impl ScratchFolder {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("clearform-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for files");
        Self { folder }
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.join(name);
        std::fs::write(&path, bytes).expect("a file");
        path
    }

    /// The folder itself.
    pub fn folder(&self) -> &PathBuf {
        &self.folder
    }
}

/// Opens `bytes` as a file, and reads its tensors.
pub fn open(name: &str, bytes: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::open(SCRATCH.write(name, bytes)) {
        read(&checkpoint);
    }
}

/// Reads the tensors of `source`; large ones only at their ends.
pub fn read(source: &dyn TensorSource) {
    for info in source.tensors() {
        let size = info.byte_count() as usize;
        if size <= MOST_READ {
            let read = source.read(&info.name);
            assert!(read.is_ok_and(|tensor| tensor.bytes.len() == size) || size > 0, "{info:?}");
        }
        let _ = source.read_range(&info.name, 0..size.min(PIECE));
        let _ = source.read_range(&info.name, size.saturating_sub(PIECE)..size);
    }
}

/// The two halves of an input, separated by a line `---`.
pub fn halves(bytes: &[u8]) -> [&[u8]; 2] {
    const SEPARATOR: &[u8] = b"\n---\n";
    match bytes.windows(SEPARATOR.len()).position(|window| window == SEPARATOR) {
        Some(at) => [&bytes[..at], &bytes[at + SEPARATOR.len()..]],
        None => [bytes, b""],
    }
}
