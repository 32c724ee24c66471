//! [`Archive`]: the zip format of `torch.save`, with a pickle and one record per storage.
//!
//! Only the features of zip that `torch.save` uses are read:
//! <https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT>, sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16. Every
//! length and offset is checked against the file's size.

use super::input::ByteReader;
use super::{BIG_ENDIAN, LONGEST_PICKLE, Validated, printed};
use crate::storage_view::{Compression, FileRange};
use crate::{Result, TensorFile};
use std::collections::HashMap;

const PICKLE: &str = "data.pkl";
// Signatures and sizes of the zip structures: end of the central directory, its zip64 locator and zip64 form, an entry
// of the central directory ("listed"), and the header before each record ("local").
const END: &[u8] = b"PK\x05\x06";
const END_BYTES: u64 = 22;
const LONGEST_COMMENT: u64 = 65_535;
const LOCATOR: &[u8] = b"PK\x06\x07";
const LOCATOR_BYTES: u64 = 20;
const LARGE_END: &[u8] = b"PK\x06\x06";
const LARGE_END_BYTES: u64 = 56;
const LISTED: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";
const LOCAL_BYTES: u64 = 30;
const LONGEST_DIRECTORY: u64 = 32 << 20;
/// In place of a number that does not fit 32 bits and is in the zip64 extra field.
const IN_EXTRA_FIELD: u64 = 0xffff_ffff;
/// The kind of the zip64 extra field.
const ZIP64: u64 = 1;
/// The flag of encrypted records.
const ENCRYPTED: u64 = 1;
/// Deflate at best repeats 258 bytes for two bits.
const MOST_DEFLATION: u64 = 1032;

/// The records of a file.
#[derive(Debug)]
pub(super) struct Archive<'f> {
    file: &'f TensorFile,
    entries: HashMap<String, ZipEntry>,
    /// The folder in the archive that holds all records, with its slash.
    folder: String,
}

/// A record's entry in the central directory.
#[derive(Debug)]
struct ZipEntry {
    /// Offset of the local header.
    header: u64,
    packed: u64,
    size: u64,
    compression: Compression,
}

impl<'f> Archive<'f> {
    /// Reads the central directory of `file`.
    pub fn open(file: &'f TensorFile) -> Result<Self> {
        let (start, length) = directory(file)?;
        let bytes = read(file, start, length)?;
        let entries = entries(&bytes).map_err(|reason| file.bad(format!("its zip directory is damaged: {reason}")))?;
        let folder = folder(&entries).map_err(|reason| file.bad(reason))?;
        let archive = Self { file, entries, folder };
        archive.check_byte_order()?;
        Ok(archive)
    }

    /// Reads and unpacks the pickle.
    pub fn pickle(&self) -> Result<Vec<u8>> {
        let record = self.record(PICKLE)?;
        if record.size > LONGEST_PICKLE {
            let reason = format!("a pickle of {} bytes, more than the {LONGEST_PICKLE} allowed", record.size);
            return Err(self.file.bad(reason));
        }
        self.file.read_record(&record)
    }

    /// The record of the storage `key`.
    pub fn storage(&self, key: &str) -> Result<FileRange> {
        self.record(&format!("data/{key}"))
    }

    fn check_byte_order(&self) -> Result<()> {
        const NAME: &str = "byteorder";
        if !self.entries.contains_key(&format!("{}{NAME}", self.folder)) {
            return Ok(());
        }
        let record = self.record(NAME)?;
        match record.size {
            0..=64 if self.file.read_record(&record)? == b"little" => Ok(()),
            _ => Err(self.file.bad(BIG_ENDIAN.to_owned())),
        }
    }

    /// The record `name`. Its local header must be read, as only that one states its own length.
    fn record(&self, name: &str) -> Result<FileRange> {
        let name = format!("{}{name}", self.folder);
        let missing = || self.file.bad(format!("record {} is missing from the archive", printed(&name)));
        let listed = self.entries.get(&name).ok_or_else(missing)?;
        let damaged = |reason| self.file.bad(format!("record {}: {reason}", printed(&name)));
        let header = read(self.file, listed.header, LOCAL_BYTES)?;
        let gap = listed.gap(&header).map_err(damaged)?;
        let start = listed.header + LOCAL_BYTES + gap;
        match start.checked_add(listed.packed) {
            Some(end) if end <= self.file.size => {
                Ok(FileRange { bytes: start..end, size: listed.size, compression: listed.compression })
            }
            _ => Err(damaged(format!("{} bytes from {start} go past the file's end", listed.packed))),
        }
    }
}

impl ZipEntry {
    /// Bytes between the local header and the record's contents: its name and extra field.
    fn gap(&self, header: &[u8]) -> Validated<u64> {
        let mut input = ByteReader::new(header);
        let signature = input.take(4)?;
        input.take(4)?;
        let compression = compression(input.number(2)?)?;
        if signature != LOCAL || compression != self.compression {
            return Err("its header does not agree with the directory".to_owned());
        }
        input.take(16)?;
        Ok(input.number(2)? + input.number(2)?)
    }

    /// Reads one entry of the central directory, after its signature.
    fn read(input: &mut ByteReader) -> Validated<(String, Self)> {
        input.take(4)?;
        let flags = input.number(2)?;
        let compression = compression(input.number(2)?)?;
        input.take(8)?;
        let packed = input.number(4)?;
        let size = input.number(4)?;
        let lengths = [input.number(2)?, input.number(2)?, input.number(2)?];
        input.take(8)?;
        let header = input.number(4)?;
        let name = String::from_utf8(input.take(lengths[0])?.to_vec()).map_err(|_| "a name that is not text")?;
        let mut numbers = [size, packed, header];
        read_zip64(&mut numbers, input.take(lengths[1])?)?;
        input.take(lengths[2])?;
        let [size, packed, header] = numbers;
        let listed = Self { header, packed, size, compression };
        listed.check(flags).map_err(|reason| format!("record {}: {reason}", printed(&name)))?;
        Ok((name, listed))
    }

    fn check(&self, flags: u64) -> Validated<()> {
        let Self { packed, size, compression, .. } = *self;
        if flags & ENCRYPTED != 0 {
            return Err("it is encrypted".to_owned());
        }
        match compression {
            Compression::Plain if size != packed => Err(format!("{size} bytes are stored in {packed}")),
            Compression::Deflated if size > packed.saturating_mul(MOST_DEFLATION) => {
                Err(format!("{packed} bytes cannot unpack to the {size} it claims: refused as a zip bomb"))
            }
            _ => Ok(()),
        }
    }
}

/// Reads a range that the file claims to have.
fn read(file: &TensorFile, start: u64, length: u64) -> Result<Vec<u8>> {
    match start.checked_add(length) {
        Some(end) if end <= file.size => file.read(start..end),
        _ => Err(file.bad(format!("{length} bytes from {start} go past the end of the zip file: it is damaged"))),
    }
}

/// (start, length) of the central directory.
fn directory(file: &TensorFile) -> Result<(u64, u64)> {
    let bad = |reason: String| file.bad(reason);
    let tail_start = file.size.saturating_sub(END_BYTES + LONGEST_COMMENT);
    let tail = file.read(tail_start..file.size)?;
    let cut =
        || bad("a zip file, as PyTorch writes, without its directory: it is cut short, download it again".to_owned());
    let end = tail.windows(END_BYTES as usize).rposition(|bytes| bytes.starts_with(END)).ok_or_else(cut)?;
    let mut found = start_and_length(&tail[end..], 12, 4).map_err(bad)?;
    let at = tail_start + end as u64;
    let locator = at.checked_sub(LOCATOR_BYTES).map(|start| read(file, start, LOCATOR_BYTES)).transpose()?;
    if let Some(locator) = locator.filter(|locator| locator.starts_with(LOCATOR)) {
        let mut input = ByteReader::new(&locator[8..]);
        let record = read(file, input.number(8).map_err(bad)?, LARGE_END_BYTES)?;
        if !record.starts_with(LARGE_END) {
            return Err(bad("the zip64 end of its directory is not where the file states".to_owned()));
        }
        found = start_and_length(&record, 40, 8).map_err(bad)?;
    }
    match found {
        (_, length) if length > LONGEST_DIRECTORY => {
            Err(bad(format!("a zip directory of {length} bytes, more than the {LONGEST_DIRECTORY} allowed")))
        }
        found => Ok(found),
    }
}

/// Start and length of the central directory from the structure that ends it, in which they are numbers of `width`
/// bytes at `offset`.
fn start_and_length(end: &[u8], offset: u64, width: u64) -> Validated<(u64, u64)> {
    let mut input = ByteReader::new(end);
    input.take(offset)?;
    let length = input.number(width)?;
    Ok((input.number(width)?, length))
}

fn entries(bytes: &[u8]) -> Validated<HashMap<String, ZipEntry>> {
    let mut entries = HashMap::new();
    let mut input = ByteReader::new(bytes);
    while input.position() < bytes.len() {
        if input.take(4)? != LISTED {
            return Err("an entry without its signature".to_owned());
        }
        let (name, listed) = ZipEntry::read(&mut input)?;
        if entries.contains_key(&name) {
            return Err(format!("record {} is given twice", printed(&name)));
        }
        entries.insert(name, listed);
    }
    Ok(entries)
}

/// Reads those of `numbers` that do not fit 32 bits from the zip64 extra field, which has them in the same order.
fn read_zip64(numbers: &mut [u64; 3], extra: &[u8]) -> Validated<()> {
    let mut input = ByteReader::new(extra);
    while extra.len() - input.position() >= 4 {
        let kind = input.number(2)?;
        let length = input.number(2)?;
        let mut field = ByteReader::new(input.take(length)?);
        if kind == ZIP64 {
            for number in numbers.iter_mut().filter(|number| **number == IN_EXTRA_FIELD) {
                *number = field.number(8)?;
            }
        }
    }
    Ok(())
}

fn compression(method: u64) -> Validated<Compression> {
    match method {
        0 => Ok(Compression::Plain),
        8 => Ok(Compression::Deflated),
        other => Err(format!("compression method {other}, expected none or deflate: repack it")),
    }
}

/// The folder that holds the pickle.
fn folder(entries: &HashMap<String, ZipEntry>) -> Validated<String> {
    let is_pickle = |name: &&str| name.strip_suffix(PICKLE).is_some_and(|folder| folder.ends_with('/'));
    let mut pickles: Vec<&str> = entries.keys().map(String::as_str).filter(is_pickle).collect();
    pickles.sort_unstable();
    match pickles[..] {
        [] => Err("a zip file that torch.save did not write (it has no data.pkl): unpack it".to_owned()),
        [only] => {
            let folder = &only[..only.len() - PICKLE.len()];
            let program = format!("{folder}code/");
            match entries.keys().any(|name| name.starts_with(&program)) {
                true => Err("a TorchScript program, not tensors: save the model's state_dict".to_owned()),
                false => Ok(folder.to_owned()),
            }
        }
        _ => Err(format!("{} pickles in one archive, one of them {}", pickles.len(), printed(pickles[0]))),
    }
}
