//! File operations: positioned reads, hashes, and atomic writes. It knows no tensors.

use crate::stream::{Digest, RunningDigest};
use crate::{Result, WeightsError};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use tempfile::NamedTempFile;

/// Bytes hashed at a time.
const HASH_CHUNK: usize = 1 << 20;

/// Size and hash of the file at `path`.
///
/// # Errors
/// [`WeightsError::Io`] if the file cannot be read.
pub fn digest(path: impl AsRef<Path>) -> Result<Digest> {
    let path = path.as_ref();
    hash(path).map_err(|source| WeightsError::Io { path: path.to_owned(), source })
}

/// Replaces the file at `path`: writes a temporary file in the same folder, syncs it and renames it. `path` holds
/// either the old bytes or the new ones.
///
/// # Errors
/// [`WeightsError::Io`] if any of it fails; `path` is then unchanged.
pub fn write_atomically(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let write = || {
        let mut file = temporary_file_for(path)?;
        file.write_all(bytes)?;
        persist(file, path)
    };
    write().map_err(|source| WeightsError::Io { path: path.to_owned(), source })
}

/// A temporary file in the folder of `path`, so that [`persist`] can rename it there. Dropping it deletes it.
pub(crate) fn temporary_file_for(path: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".clearform-").suffix(".part");
    // Temporary files are private by default; this one becomes the user's, with the permissions that the umask leaves.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder_of(path))
}

/// Reserves `size` bytes on the disk, so that a full disk is reported before hours of work and not after. Where a file
/// system cannot reserve space, writing reports it.
#[cfg(target_os = "linux")]
pub(crate) fn reserve(file: &File, size: u64) -> io::Result<()> {
    use rustix::io::Errno;
    let taken = rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, size);
    if let Err(error @ (Errno::NOSPC | Errno::FBIG | Errno::DQUOT)) = taken {
        let reason = format!("{size} bytes are needed: {error}; free some space or write to another disk");
        return Err(io::Error::new(io::ErrorKind::StorageFull, reason));
    }
    Ok(())
}

/// Does nothing: only Linux reserves space here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn reserve(_: &File, _: u64) -> io::Result<()> {
    Ok(())
}

/// Syncs a temporary file to the disk and renames it to `path`.
pub(crate) fn persist(file: NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().sync_all()?;
    file.persist(path)?;
    // The rename survives a crash only once the folder is synced. Not every system can do that, so errors are ignored.
    let _ = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Reads `length` bytes from `offset` without moving the file's cursor, so threads may share the file.
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

/// The bytes of a regular file of at most 1 GiB: a device or pipe could block or never end.
///
/// # Errors
/// It cannot be read, or is no such file.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    const LARGEST: u64 = 1 << 30;
    let metadata = std::fs::metadata(path)?;
    match (metadata.is_file(), metadata.len()) {
        (false, _) => Err(io::Error::other("not a regular file")),
        (true, size) if size > LARGEST => Err(io::Error::other(format!("expected a small file, found {size} bytes"))),
        (true, _) => std::fs::read(path),
    }
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
    fn files_are_hashed_and_replaced() {
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
