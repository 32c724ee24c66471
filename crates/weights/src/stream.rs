//! [`HashingWriter`]: writes a file and hashes it at the same time, each on its own thread, while the caller prepares
//! the next bytes.

use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

/// Size and hash of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    /// Bytes.
    pub size: u64,
    /// SHA-256 as 64 lower-case hexadecimal digits.
    pub sha256: String,
}

/// A file being written and hashed, each on a thread of its own.
#[derive(Debug)]
pub(crate) struct HashingWriter {
    writing: WriterThread<io::Result<()>>,
    hashing: WriterThread<Digest>,
}

/// A thread that consumes chunks of bytes. The channel has no buffer: sending waits until the thread takes the chunk,
/// so at most two chunks are in memory.
#[derive(Debug)]
struct WriterThread<T> {
    bytes: SyncSender<Arc<Vec<u8>>>,
    thread: JoinHandle<T>,
}

impl HashingWriter {
    /// Writes to `file` from its cursor on.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn into_file(mut file: File) -> io::Result<Self> {
        Ok(Self {
            writing: WriterThread::spawn(move |chunks| chunks.iter().try_for_each(|bytes| file.write_all(&bytes)))?,
            hashing: WriterThread::spawn(|chunks| {
                let mut hash = RunningDigest::default();
                chunks.iter().for_each(|bytes| hash.update(&bytes));
                hash.finish()
            })?,
        })
    }

    /// Writes and hashes `bytes`. [`Self::finish`] returns an error of writing; [`Self::broken`] detects it earlier.
    pub fn send(&self, bytes: Vec<u8>) {
        let bytes = Arc::new(bytes);
        self.writing.send(&bytes);
        self.hashing.send(&bytes);
    }

    /// Whether writing has failed, so that sending more is useless.
    pub fn broken(&self) -> bool {
        self.writing.thread.is_finished()
    }

    /// Waits until all is written and hashed.
    pub fn finish(self) -> io::Result<Digest> {
        self.writing.finish()??;
        self.hashing.finish()
    }
}

impl<T: Send + 'static> WriterThread<T> {
    fn spawn(work: impl FnOnce(Receiver<Arc<Vec<u8>>>) -> T + Send + 'static) -> io::Result<Self> {
        let (bytes, chunks) = sync_channel(0);
        let refused = |error| io::Error::other(format!("no thread to write with, for want of memory: {error}"));
        let thread = thread::Builder::new().spawn(move || work(chunks)).map_err(refused)?;
        Ok(Self { bytes, thread })
    }

    /// Sending to a thread that has ended is not an error here: [`Self::finish`] returns why it ended.
    fn send(&self, bytes: &Arc<Vec<u8>>) {
        let _ = self.bytes.send(bytes.clone());
    }

    fn finish(self) -> io::Result<T> {
        drop(self.bytes);
        self.thread.join().map_err(|_| io::Error::other("a thread that wrote a file ended early"))
    }
}

/// An unfinished [`Digest`].
#[derive(Default)]
pub(crate) struct RunningDigest {
    size: u64,
    hash: Sha256,
}

impl RunningDigest {
    /// Adds `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        self.hash.update(bytes);
    }

    /// Size and hash of all bytes added.
    pub fn finish(self) -> Digest {
        let sha256 = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Digest { size: self.size, sha256 }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn bytes_arrive_in_order_and_are_hashed() {
        let mut file = tempfile::tempfile().unwrap();
        let stream = HashingWriter::into_file(file.try_clone().unwrap()).unwrap();
        ["a", "", "b", "c"].iter().for_each(|bytes| stream.send(bytes.as_bytes().to_vec()));
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(stream.finish().unwrap(), Digest { size: 3, sha256: known.to_owned() });
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_reported() {
        let stream = HashingWriter::into_file(File::options().write(true).open("/dev/full").unwrap()).unwrap();
        while !stream.broken() {
            stream.send(vec![0; 9]);
        }
        assert_eq!(stream.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
