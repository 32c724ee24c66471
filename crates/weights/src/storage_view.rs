//! [`StorageView`]: where a tensor's values are in its file, and how they are read: compressed, strided as PyTorch's
//! views are, or packed in GGUF's quantised blocks. It knows no names.

use crate::files;
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use flate2::read::DeflateDecoder;
use safetensors::View;
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

/// Bytes of a dequantised value.
const F32_BYTES: u64 = 4;
/// Blocks dequantised at once. candle copies the packed and the unpacked bytes; for 4096 blocks of 256 values that is
/// about 5 MB, whatever the size of the tensor.
const MOST_BLOCKS: usize = 4096;

/// A record: a range of bytes in a file, which may be compressed.
#[derive(Debug, Clone)]
pub(crate) struct FileRange {
    /// Its bytes in the file.
    pub bytes: Range<u64>,
    /// Its length once unpacked.
    pub size: u64,
    pub compression: Compression,
}

/// How a record is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Plain,
    Deflated,
    /// Quantised in blocks, which unpack to F32.
    Blocks(GgmlDType),
}

/// The values of one tensor: contiguous runs of bytes at regular strides in a record.
#[derive(Debug, Clone)]
pub(crate) struct StorageView {
    record: FileRange,
    /// Offset of the first value in the unpacked record.
    start: u64,
    /// (size, stride in bytes) of the axes along which runs repeat, outermost first; empty if the tensor is contiguous.
    axes: Vec<(u64, u64)>,
    /// Length of a contiguous run in bytes.
    run: u64,
}

impl StorageView {
    /// All of `bytes`, uncompressed and contiguous.
    pub fn whole(bytes: Range<u64>) -> Self {
        let size = bytes.end - bytes.start;
        Self::of(FileRange { bytes, size, compression: Compression::Plain })
    }

    /// All of `record`, unpacked.
    pub fn of(record: FileRange) -> Self {
        let run = record.size;
        Self { record, start: 0, axes: Vec::new(), run }
    }

    /// Values of `width` bytes from the offset `start` on, along `axes` of (size, stride in bytes). All values must lie
    /// within the record, and their size must fit a `u64`.
    pub fn strided(record: FileRange, start: u64, mut axes: Vec<(u64, u64)>, width: u64) -> Self {
        if axes.iter().any(|&(size, _)| size == 0) {
            return Self { record, start: 0, axes: Vec::new(), run: 0 };
        }
        axes.retain(|&(size, _)| size != 1);
        let mut run = width;
        while let Some((size, _)) = axes.pop_if(|&mut (_, stride)| stride == run) {
            run *= size;
        }
        Self { record, start, axes, run }
    }

    /// Bytes of the unpacked values.
    pub fn size(&self) -> u64 {
        self.axes.iter().map(|(size, _)| size).product::<u64>() * self.run
    }

    /// The type and the stored bytes of the quantised blocks; `None` if the values are not quantised.
    pub fn blocks(&self) -> Option<(GgmlDType, u64)> {
        match self.record.compression {
            Compression::Blocks(format) => Some((format, self.record.bytes.end - self.record.bytes.start)),
            Compression::Plain | Compression::Deflated => None,
        }
    }

    /// Reads the bytes `range` of the unpacked values, in row-major order.
    pub fn read(&self, file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
        match self.axes[..] {
            [] => self.record.read(file, self.start + range.start..self.start + range.end),
            _ if range.is_empty() => Ok(Vec::new()),
            [(rows, stride), ref inner @ ..] => self.gather(file, range, (self.size() / rows, stride, inner)),
        }
    }

    /// Reads the stored bytes `range` of a view of all blocks of a record, without unpacking them.
    pub fn read_blocks(&self, file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
        files::read_at(file, self.record.bytes.start + range.start, (range.end - range.start) as usize)
    }

    /// Reads everything between the first and the last row of `range` at once and picks the values from it: reading
    /// each run by itself could take millions of reads. `rows` is (bytes of a row, stride between rows, axes within a
    /// row).
    fn gather(&self, file: &File, range: Range<u64>, rows: (u64, u64, &[(u64, u64)])) -> io::Result<Vec<u8>> {
        let (row, stride, inner) = rows;
        let first = range.start / row;
        let end = range.end.div_ceil(row);
        let reach = inner.iter().map(|(size, stride)| (size - 1) * stride).sum::<u64>() + self.run;
        let start = self.start + first * stride;
        let span = self.record.read(file, start..start + (end - 1 - first) * stride + reach)?;
        let mut values = Vec::with_capacity(((end - first) * row) as usize);
        for index in 0..end - first {
            self.collect(&span, index * stride, inner, &mut values);
        }
        values.truncate((range.end - first * row) as usize);
        values.drain(..(range.start - first * row) as usize);
        Ok(values)
    }

    fn collect(&self, span: &[u8], at: u64, axes: &[(u64, u64)], values: &mut Vec<u8>) {
        match axes {
            [] => values.extend_from_slice(&span[at as usize..(at + self.run) as usize]),
            [(size, stride), inner @ ..] => {
                (0..*size).for_each(|index| self.collect(span, at + index * stride, inner, values));
            }
        }
    }
}

impl FileRange {
    /// Reads the bytes `range` of the unpacked record.
    pub fn read(&self, file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
        let length = range.end - range.start;
        match self.compression {
            Compression::Plain => files::read_at(file, self.bytes.start + range.start, length as usize),
            Compression::Deflated => self.unpack(file, range),
            Compression::Blocks(format) => self.dequantise(file, range, format),
        }
    }

    fn unpack(&self, file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut unpacked = DeflateDecoder::new(RangeReader { file, left: self.bytes.clone() });
        io::copy(&mut unpacked.by_ref().take(range.start), &mut io::sink())?;
        let mut bytes = Vec::new();
        unpacked.by_ref().take(range.end - range.start).read_to_end(&mut bytes)?;
        let more = range.end == self.size && unpacked.read(&mut [0])? > 0;
        if more || bytes.len() as u64 != range.end - range.start {
            let what = if more { "more" } else { "less" };
            let reason = format!("a deflated record unpacks to {what} than the {} bytes it claims", self.size);
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(bytes)
    }

    fn dequantise(&self, file: &File, range: Range<u64>, format: GgmlDType) -> io::Result<Vec<u8>> {
        let block = format.block_size() as u64 * F32_BYTES;
        let packed = format.type_size() as u64;
        let first = range.start / block;
        let end = range.end.div_ceil(block);
        let mut values = Vec::with_capacity(((end - first) * block) as usize);
        for start in (first..end).step_by(MOST_BLOCKS) {
            let count = (end - start).min(MOST_BLOCKS as u64);
            let blocks = files::read_at(file, self.bytes.start + start * packed, (count * packed) as usize)?;
            values.extend(dequantise_blocks(blocks, format).map_err(io::Error::other)?);
        }
        values.truncate((range.end - first * block) as usize);
        values.drain(..(range.start - first * block) as usize);
        Ok(values)
    }
}

/// The F32 values of whole blocks. candle needs the blocks aligned to 16 bits, as every allocation of their size is.
fn dequantise_blocks(blocks: Vec<u8>, format: GgmlDType) -> candle_core::Result<Vec<u8>> {
    let values = blocks.len() / format.type_size() * format.block_size();
    let storage = QStorage::from_data(Cow::Owned(blocks), &Device::Cpu, format)?;
    let values = QTensor::new(storage, values)?.dequantize(&Device::Cpu)?;
    Ok(values.data().into_owned())
}

/// A range of a file as a stream.
struct RangeReader<'f> {
    file: &'f File,
    left: Range<u64>,
}

impl Read for RangeReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (self.left.end - self.left.start).min(buffer.len() as u64) as usize;
        buffer[..length].copy_from_slice(&files::read_at(self.file, self.left.start, length)?);
        self.left.start += length as u64;
        Ok(length)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn values_are_read_in_row_major_order_for_any_strides() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&(0..24).collect::<Vec<u8>>()).unwrap();
        type Axes<'a> = &'a [(u64, u64)];
        let cases: [(&str, u64, Axes, u64, &[u8]); 8] = [
            ("whole", 0, &[(2, 2), (2, 1)], 1, &[0, 1, 2, 3]),
            ("transposed", 0, &[(2, 1), (3, 2)], 1, &[0, 2, 4, 1, 3, 5]),
            ("transposed pairs", 2, &[(2, 2), (3, 4)], 2, &[2, 3, 6, 7, 10, 11, 4, 5, 8, 9, 12, 13]),
            ("columns", 1, &[(3, 6), (2, 1)], 1, &[1, 2, 7, 8, 13, 14]),
            ("expanded", 3, &[(3, 0), (2, 1)], 1, &[3, 4, 3, 4, 3, 4]),
            ("dimensions of 1", 4, &[(1, 999), (2, 4), (1, 7)], 4, &[4, 5, 6, 7, 8, 9, 10, 11]),
            ("no axes", 5, &[], 2, &[5, 6]),
            ("nothing", 99, &[(u64::MAX, 1), (0, 1)], 4, &[]),
        ];
        for (name, start, axes, width, expected) in cases {
            let record = FileRange { bytes: 0..24, size: 24, compression: Compression::Plain };
            let view = StorageView::strided(record, start, axes.to_vec(), width);
            assert_eq!(view.size(), expected.len() as u64, "{name}");
            for from in 0..=expected.len() {
                for to in from..=expected.len() {
                    let read = view.read(&file, from as u64..to as u64).unwrap();
                    assert_eq!(read, expected[from..to], "{name} {from}..{to}");
                }
            }
        }
    }
}
