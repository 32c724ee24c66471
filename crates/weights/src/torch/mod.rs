//! Files of `torch.save` (.pt, .pth, .bin, .ckpt), read as data: the pickle is parsed and never run.
//!
//! Two formats are read: the zip archive ([`archive`]) and the one before PyTorch 1.6 ([`legacy`]). Either gives a
//! pickle ([`pickle`]) and the ranges of the storages; [`state`] finds the state dict in the pickle, and each of its
//! tensors becomes a view of a storage ([`storage`]). No tensor is read here.

mod archive;
mod globals;
mod input;
mod legacy;
mod pickle;
mod state;
mod storage;
mod value;

use crate::error::{Validated, printed};
use crate::header::Header;
use crate::storage_view::FileRange;
use crate::{Result, TensorFile};
use archive::Archive;
use pickle::Pickle;
use storage::TorchStorage;

/// Far more than any model's pickle: the largest are some hundred kilobytes.
const LONGEST_PICKLE: u64 = 32 << 20;
/// All tensors together may be this many times as large as the file, plus [`SLACK`] for what compresses or repeats well
/// (zeros, expanded views). A file that claims more is refused.
const MOST_GROWTH: u64 = 4;
const SLACK: u64 = 256 << 20;
const BIG_ENDIAN: &str = "written on a machine of another byte order (big-endian): save it on a little-endian one";

/// Whether a file that starts with `beginning` is a torch file. A safetensors file may begin with the same two bytes,
/// the header's length, but its ninth byte is a brace.
pub(crate) fn recognises(beginning: &[u8]) -> bool {
    let pickled = matches!(beginning, [0x80, 2..=5, ..]);
    (pickled || beginning.starts_with(b"PK\x03\x04")) && beginning.get(8) != Some(&b'{')
}

/// Reads the names, dtypes and shapes of the tensors in `file`, but no values.
pub(crate) fn read(file: &TensorFile) -> Result<Header> {
    match file.read(0..2)?.as_slice() {
        b"PK" => read_archive(file),
        _ => legacy::read(file),
    }
}

fn read_archive(file: &TensorFile) -> Result<Header> {
    let archive = Archive::open(file)?;
    let bytes = archive.pickle()?;
    let pickle = Pickle::read(&bytes).map_err(|reason| file.bad(reason))?;
    header(file, &pickle, |storage| archive.storage(storage.key))
}

/// The state dict of `pickle`. `record` finds the range of a storage.
fn header(file: &TensorFile, pickle: &Pickle, record: impl Fn(&TorchStorage) -> Result<FileRange>) -> Result<Header> {
    let state = state::find(pickle).map_err(|reason| file.bad(reason))?;
    let mut records: Vec<Option<FileRange>> = vec![None; pickle.storages.len()];
    let mut header = Header { notes: state.notes, ..Header::default() };
    let mut total = 0u64;
    for (name, tensor) in state.tensors {
        let known = &mut records[tensor.storage];
        let record = match known {
            Some(record) => record,
            None => known.insert(checked_record(file, &pickle.storages[tensor.storage], &record)?),
        };
        let entry = tensor.entry(record);
        total = total.saturating_add(entry.view.size());
        check_growth(total, file.size).map_err(|reason| file.bad(reason))?;
        header.tensors.insert(name.to_owned(), entry);
    }
    Ok(header)
}

/// The record of `storage`, which must have the size that the pickle states.
fn checked_record(
    file: &TensorFile,
    storage: &TorchStorage,
    find: impl Fn(&TorchStorage) -> Result<FileRange>,
) -> Result<FileRange> {
    let record = find(storage)?;
    if record.size == storage.bytes {
        return Ok(record);
    }
    let TorchStorage { key, bytes, .. } = storage;
    let found = record.size;
    Err(file.bad(format!("storage {key:?} should have {bytes} bytes, found {found}: the file is damaged")))
}

fn check_growth(total: u64, size: u64) -> Validated<()> {
    if total <= size.saturating_mul(MOST_GROWTH).saturating_add(SLACK) {
        return Ok(());
    }
    Err(format!(
        "its tensors take {total} bytes or more, the file {size}: no model compresses or repeats so well; refused as a \
         zip bomb"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torch_files_are_distinguished_from_safetensors_by_content() {
        let cases: [(&[u8], bool); 6] = [
            (b"PK\x03\x04\0\0\x08\x08\0\0", true),
            (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", true),
            (b"\x80\x04\x95\x0d\0\0\0\0\0\0\0", true),
            (b"\x80\x02\0\0\0\0\0\0{\"a\"", false),
            (b"\x80\x09", false),
            (b"", false),
        ];
        for (beginning, expected) in cases {
            assert_eq!(recognises(beginning), expected, "{beginning:?}");
        }
    }

    #[test]
    fn growth_is_bounded_by_the_file() {
        assert!(check_growth(SLACK + 40, 10).is_ok());
        assert!(check_growth(SLACK + 41, 10).is_err());
        assert!(check_growth(u64::MAX, 10).is_err());
    }
}
