//! Files as such: positioned reads, hashes, and writing so that a file is whole or absent. It knows no tensors.

use crate::stream::{Digest, RunningDigest};
use crate::{Result, WeightsError};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use tempfile::NamedTempFile;

const HASH_CHUNK: usize = 1 << 20;

/// Size and hash of the file at `path`.
///
/// # Errors
/// [`WeightsError::Io`] if the file cannot be read.
pub fn digest(path: impl AsRef<Path>) -> Result<Digest> {
    let path = path.as_ref();
    hash(path).map_err(|source| WeightsError::Io { path: path.to_owned(), source })
}

/// Writes a file beside `path`, brings it to the disk and renames it: `path` holds the old bytes or the new ones.
///
/// # Errors
/// [`WeightsError::Io`] if any of it fails; `path` is then as it was.
pub fn write_atomically(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let write = || {
        let mut file = beside(path)?;
        file.write_all(bytes)?;
        settle(file, path)
    };
    write().map_err(|source| WeightsError::Io { path: path.to_owned(), source })
}

/// An unfinished file in the folder of `path`; it disappears unless it is [settled](settle).
pub(crate) fn beside(path: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".clearform-").suffix(".part");
    #[cfg(unix)]
    let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(everyone);
    builder.tempfile_in(folder_of(path))
}

/// Takes `size` bytes of the disk for an unfinished file, so that one that cannot be finished is not begun. Systems and
/// disks that cannot take any beforehand are found out in writing.
#[cfg(target_os = "linux")]
pub(crate) fn reserve(file: &File, size: u64) -> io::Result<()> {
    use rustix::io::Errno;
    let taken = rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, size);
    if let Err(error @ (Errno::NOSPC | Errno::FBIG | Errno::DQUOT)) = taken {
        let reason = format!("{size} bytes are needed: {error}; give another place or make room");
        return Err(io::Error::new(io::ErrorKind::StorageFull, reason));
    }
    Ok(())
}

/// Here no bytes can be taken beforehand.
#[cfg(not(target_os = "linux"))]
pub(crate) fn reserve(_: &File, _: u64) -> io::Result<()> {
    Ok(())
}

/// Brings an unfinished file to the disk and gives it its name.
pub(crate) fn settle(file: NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().sync_all()?;
    file.persist(path)?;
    // The name is only safe once its folder is; systems that cannot sync a folder say so, and nothing more can be done.
    let _ = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Reads `length` bytes from `offset`, leaving the file's cursor alone, so that threads may share the file.
#[cfg(unix)]
pub(crate) fn read_at(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, offset)?;
    Ok(bytes)
}

/// Reads `length` bytes from `offset`.
#[cfg(windows)]
pub(crate) fn read_at(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        match std::os::windows::fs::FileExt::seek_read(file, &mut bytes[done..], offset + done as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(bytes)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn hash(path: &Path) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hash = RunningDigest::default();
    let mut chunk = vec![0; HASH_CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hash.finish()),
            count => hash.update(&chunk[..count]),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hashes_and_replaces_whole_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_atomically(&path, b"first").unwrap();
        write_atomically(&path, b"abc").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest(&path).unwrap(), Digest { size: 3, sha256: known.to_owned() });
    }

    #[test]
    fn a_failed_write_leaves_the_folder_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        std::fs::create_dir_all(path.join("inside")).unwrap();
        assert!(matches!(write_atomically(&path, b"x"), Err(WeightsError::Io { .. })));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
