//! [`GgufReader`]: the directory of a GGUF file taken one piece after another, never past its end. It reads a window of the
//! file at a time and knows no meaning of the pieces.

use crate::checkpoint::TensorFile;
use crate::{Result, WeightsError};

/// The largest, of text encoders with their tokenizer's lists, take some 20 MB.
const LONGEST_DIRECTORY: u64 = 128 << 20;
const WINDOW: u64 = 1 << 18;
/// As for the names in a safetensors header.
pub(super) const LONGEST_NAME: u64 = 4096;

/// What is left of a directory.
#[derive(Debug)]
pub(super) struct GgufReader<'f> {
    file: &'f TensorFile,
    at: u64,
    end: u64,
    window: Vec<u8>,
    /// Where the window begins in the file.
    start: u64,
    /// What is being read, for messages.
    within: String,
}

impl<'f> GgufReader<'f> {
    pub fn new(file: &'f TensorFile) -> Self {
        let end = file.size.min(LONGEST_DIRECTORY);
        Self { file, at: 0, end, window: Vec::new(), start: 0, within: "the head of the GGUF file".to_owned() }
    }

    /// Says what is read from here on.
    pub fn enter(&mut self, within: String) {
        self.within = within;
    }

    /// The error that says what is wrong with what is being read.
    pub fn bad(&self, reason: impl std::fmt::Display) -> WeightsError {
        self.file.bad(format!("{}: {reason}", self.within))
    }

    /// How many bytes were taken.
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

    /// Passes over `count` bytes.
    pub fn skip(&mut self, count: u64) -> Result<()> {
        self.skip_items(count, 1)
    }

    /// Passes over `count` items of `width` bytes.
    pub fn skip_items(&mut self, count: u64, width: u64) -> Result<()> {
        self.judge_count(count, width)?;
        self.at += count * width;
        Ok(())
    }

    /// Refuses `count` items of `width` bytes or more where fewer are left.
    pub fn judge_count(&self, count: u64, width: u64) -> Result<()> {
        let left = self.end - self.at;
        if count.checked_mul(width).is_some_and(|bytes| bytes <= left) {
            return Ok(());
        }
        let what = if width == 1 { format!("{count} bytes") } else { format!("{count} items of {width} bytes") };
        Err(self.bad(match self.end == self.file.size {
            true => {
                format!("{what} claimed where {left} bytes are left: it is cut short or damaged, download it again")
            }
            false => format!("{what} claimed where {left} are left of the {LONGEST_DIRECTORY} a directory may take"),
        }))
    }

    /// An unsigned little-endian number of `width` bytes, at most eight.
    pub fn number(&mut self, width: u64) -> Result<u64> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    /// A name, behind its length.
    pub fn name(&mut self) -> Result<String> {
        let length = self.number(8)?;
        if length > LONGEST_NAME {
            return Err(self.bad(format!("a name of {length} bytes, longer than the {LONGEST_NAME} allowed")));
        }
        let bytes = self.take(length)?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.bad("a name that is not text"))
    }
}
