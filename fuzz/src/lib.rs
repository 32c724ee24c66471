//! What the targets share: files to open ([`Scratch`]), reading whatever was opened, and the lending of a file to a
//! plugin ([`lend`]). Nothing here judges an answer: an error is as good as a checkpoint, and only a panic, a hang or
//! too much memory is wrong, which the fuzzer sees by itself.

pub mod lend;

use clearform_weights::{Checkpoint, TensorInfo, TensorSource};
use std::path::PathBuf;
use std::sync::LazyLock;

/// Tensors that claim more are read only at their ends.
const MOST_READ: usize = 1 << 20;
const PIECE: usize = 16;

/// Of this process, in the folder for temporary files.
pub static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

/// A folder for the files that readers open.
pub struct Scratch {
    folder: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("clearform-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for files");
        Self { folder }
    }

    /// Writes a file and says where it is.
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

/// Reads the tensors of `source`, of large ones the ends.
pub fn read(source: &dyn TensorSource) {
    for info in source.tensors() {
        let size = size(&info);
        if size <= MOST_READ {
            let read = source.read(&info.name);
            assert!(read.is_ok_and(|tensor| tensor.bytes.len() == size) || size > 0, "{info:?}");
        }
        let _ = source.read_range(&info.name, 0..size.min(PIECE));
        let _ = source.read_range(&info.name, size.saturating_sub(PIECE)..size);
    }
}

fn size(info: &TensorInfo) -> usize {
    info.shape.iter().product::<usize>() * info.dtype.bitsize() / 8
}

/// The two parts of an input, of which a line `---` stands between.
pub fn halves(bytes: &[u8]) -> [&[u8]; 2] {
    const BETWEEN: &[u8] = b"\n---\n";
    match bytes.windows(BETWEEN.len()).position(|window| window == BETWEEN) {
        Some(at) => [&bytes[..at], &bytes[at + BETWEEN.len()..]],
        None => [bytes, b""],
    }
}
