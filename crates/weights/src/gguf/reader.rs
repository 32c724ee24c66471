//! [`GgufReader`]: reads the head of a GGUF file in order and never past its end, a window of the file at a time.

use crate::{Result, TensorFile, WeightsError};

/// The limit for metadata and list of tensors. The largest, of text encoders with the lists of their tokenizers, take
/// about 20 MB.
const LONGEST_DIRECTORY: u64 = 128 << 20;
/// Bytes read from the file at a time.
const WINDOW: u64 = 1 << 18;
/// As for the names in a safetensors header.
pub(super) const LONGEST_NAME: u64 = 4096;

/// A cursor in the head of a GGUF file.
#[derive(Debug)]
pub(super) struct GgufReader<'f> {
    file: &'f TensorFile,
    at: u64,
    end: u64,
    window: Vec<u8>,
    /// The window's offset in the file.
    start: u64,
    /// What is being read, for messages.
    section: String,
}

impl<'f> GgufReader<'f> {
    /// Begins at the start of `file`.
    pub fn new(file: &'f TensorFile) -> Self {
        let end = file.size.min(LONGEST_DIRECTORY);
        Self { file, at: 0, end, window: Vec::new(), start: 0, section: "the head of the GGUF file".to_owned() }
    }

    /// Sets what messages name as the place of an error from here on.
    pub fn enter(&mut self, section: String) {
        self.section = section;
    }

    /// A [`WeightsError::BadFile`] that names what is being read.
    pub fn bad(&self, reason: impl std::fmt::Display) -> WeightsError {
        self.file.bad(format!("{}: {reason}", self.section))
    }

    /// How many bytes have been read.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: u64) -> Result<&[u8]> {
        let from = self.at;
        self.skip(count)?;
        if from < self.start || self.at > self.start + self.window.len() as u64 {
            self.window = self.file.read(from..self.end.min(from + count.max(WINDOW)))?;
            self.start = from;
        }
        Ok(&self.window[(from - self.start) as usize..(self.at - self.start) as usize])
    }

    /// Skips `count` bytes.
    pub fn skip(&mut self, count: u64) -> Result<()> {
        self.skip_items(count, 1)
    }

    /// Skips `count` items of `width` bytes.
    pub fn skip_items(&mut self, count: u64, width: u64) -> Result<()> {
        self.check_count(count, width)?;
        self.at += count * width;
        Ok(())
    }

    /// An error if fewer than `count` items of `width` bytes are left.
    pub fn check_count(&self, count: u64, width: u64) -> Result<()> {
        let left = self.end - self.at;
        if count.checked_mul(width).is_some_and(|bytes| bytes <= left) {
            return Ok(());
        }
        let what = if width == 1 { format!("{count} bytes") } else { format!("{count} items of {width} bytes") };
        Err(self.bad(match self.end == self.file.size {
            true => format!("{what} claimed, only {left} bytes left: it is cut short or damaged, download it again"),
            false => format!("{what} claimed, only {left} left of the {LONGEST_DIRECTORY} allowed before the values"),
        }))
    }

    /// An unsigned little-endian number of `width` bytes, at most eight.
    pub fn number(&mut self, width: u64) -> Result<u64> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    /// A length and a name of that length.
    pub fn name(&mut self) -> Result<String> {
        let length = self.number(8)?;
        if length > LONGEST_NAME {
            return Err(self.bad(format!("a name of {length} bytes, longer than the {LONGEST_NAME} allowed")));
        }
        let bytes = self.take(length)?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.bad("a name that is not text"))
    }
}
