//! [`ByteReader`]: reads bytes in order and never past their end. It knows no format.

use super::Validated;

/// A cursor in some bytes.
#[derive(Debug, Clone)]
pub(super) struct ByteReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> ByteReader<'a> {
    /// Begins at the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How many bytes have been read.
    pub fn position(&self) -> usize {
        self.at
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: u64) -> Validated<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        if count > left as u64 {
            return Err(format!("{count} bytes claimed, only {left} left"));
        }
        let taken = &self.bytes[self.at..self.at + count as usize];
        self.at += count as usize;
        Ok(taken)
    }

    /// The next byte.
    pub fn byte(&mut self) -> Validated<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    /// An unsigned little-endian number of `width` bytes, at most eight.
    pub fn number(&mut self, width: u64) -> Validated<u64> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    /// Text up to the next line feed, which is skipped.
    pub fn line(&mut self) -> Validated<&'a str> {
        let length = self.bytes[self.at..].iter().position(|&byte| byte == b'\n').ok_or("a line without an end")?;
        let line = std::str::from_utf8(self.take(length as u64)?).map_err(|_| "a line that is not text")?;
        self.byte()?;
        Ok(line)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reading_past_the_end_is_an_error() {
        let mut input = ByteReader::new(b"\x01\x02name\nrest");
        assert_eq!(input.number(2).unwrap(), 0x0201);
        assert_eq!(input.line().unwrap(), "name");
        assert!(input.line().is_err());
        assert_eq!(input.take(u64::MAX).unwrap_err(), "18446744073709551615 bytes claimed, only 4 left");
        assert_eq!(input.take(4).unwrap(), b"rest");
        assert!(input.byte().is_err());
        assert_eq!(input.position(), 11);
    }
}
