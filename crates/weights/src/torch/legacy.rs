//! The format of `torch.save` before PyTorch 1.6: five pickles, then the storages in sequence.
//!
//! The pickles are a magic number, a version, the machine's byte order and sizes, the object, and the keys of the
//! storages in order. Each storage begins with the number of its elements.

use super::pickle::Pickle;
use super::storage::{TorchStorage, width};
use super::value::{PickleValue, ValueArena, ValueId};
use super::{LONGEST_PICKLE, Validated, printed};
use crate::header::Header;
use crate::storage_view::{Compression, FileRange};
use crate::{Result, TensorFile};
use std::collections::HashMap;

const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
const VERSION: i128 = 1001;
const COUNT_BYTES: u64 = 8;

/// Reads the pickles of `file` and the sizes of its storages.
pub(super) fn read(file: &TensorFile) -> Result<Header> {
    let bytes = file.read(0..file.size.min(LONGEST_PICKLE))?;
    let (object, keys, end) = pickles(&bytes).map_err(|reason| file.bad(reason))?;
    let keys = texts(&keys.values, keys.root).map_err(|reason| file.bad(reason))?;
    let records = records(file, &object, &keys, end)?;
    let missing = |storage: &TorchStorage| file.bad(format!("storage {:?} is missing from the file", storage.key));
    super::header(file, &object, |storage| records.get(storage.key).cloned().ok_or_else(|| missing(storage)))
}

/// (the object, the keys of its storages, the offset at which the pickles end).
fn pickles(bytes: &[u8]) -> Validated<(Pickle<'_>, Pickle<'_>, u64)> {
    let magic = Pickle::read(bytes)?;
    if !matches!(magic.values.get(magic.root), PickleValue::Integer(MAGIC)) {
        return Err("a Python pickle that torch.save did not write: save a state_dict with safetensors".to_owned());
    }
    let mut end = magic.length;
    let mut next_pickle = || {
        let pickle = Pickle::read(&bytes[end..])?;
        end += pickle.length;
        Validated::Ok(pickle)
    };
    let version = next_pickle()?;
    if !matches!(version.values.get(version.root), PickleValue::Integer(VERSION)) {
        return Err(format!("a torch file of another version than {VERSION}: save it again with PyTorch"));
    }
    check_byte_order(&next_pickle()?)?;
    let object = next_pickle()?;
    let keys = next_pickle()?;
    Ok((object, keys, end as u64))
}

/// The third pickle states the byte order of the machine that wrote the file.
fn check_byte_order(sizes: &Pickle) -> Validated<()> {
    let PickleValue::Dict(pairs) = sizes.values.get(sizes.root) else { return Ok(()) };
    let order = pairs.iter().find(|pair| sizes.values.text(pair.0) == Ok("little_endian"));
    match order.map(|pair| sizes.values.get(pair.1)) {
        Some(PickleValue::Bool(false)) => Err(super::BIG_ENDIAN.to_owned()),
        _ => Ok(()),
    }
}

fn texts<'a>(values: &ValueArena<'a>, list: ValueId) -> Validated<Vec<&'a str>> {
    match values.get(list) {
        PickleValue::List(keys) => keys.iter().map(|&key| values.text(key)).collect(),
        other => Err(format!("expected the keys of the storages, found {}", other.describe())),
    }
}

fn records<'a>(file: &TensorFile, object: &Pickle, keys: &[&'a str], end: u64) -> Result<HashMap<&'a str, FileRange>> {
    let claims: HashMap<&str, &TorchStorage> = object.storages.iter().map(|storage| (storage.key, storage)).collect();
    let mut records = HashMap::new();
    let mut at = end;
    for key in keys {
        let known = claims.get(key).ok_or_else(|| file.bad(format!("storage {} is in no tensor", printed(key))))?;
        let cut = || file.bad(format!("storage {key:?} goes past the file's end: it is cut short, download it again"));
        let start = at + COUNT_BYTES;
        if start > file.size {
            return Err(cut());
        }
        let count = file.read(at..start)?.iter().rev().fold(0, |count, &byte| count << 8 | u64::from(byte));
        let size = count.checked_mul(known.dtype.map_or(1, width)).ok_or_else(cut)?;
        at = start.checked_add(size).filter(|&end| end <= file.size).ok_or_else(cut)?;
        let record = FileRange { bytes: start..at, size, compression: Compression::Plain };
        if records.insert(*key, record).is_some() {
            return Err(file.bad(format!("storage {key:?} is given twice")));
        }
    }
    Ok(records)
}
