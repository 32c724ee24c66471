//! [`StorageView`]: where a tensor's values lie in its file, and their reading. It knows no names, and of number formats only
//! the blocks that values are packed in.

use crate::files;
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use flate2::read::DeflateDecoder;
use safetensors::View;
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

/// Bytes of an unpacked value.
const F32_BYTES: u64 = 4;
/// Blocks unpacked at once: their copies take some megabytes.
const MOST_BLOCKS: usize = 4096;

/// A run of bytes that a file holds.
#[derive(Debug, Clone)]
pub(crate) struct FileRange {
    /// Where it lies, counted from the beginning of the file.
    pub bytes: Range<u64>,
    /// Its length once unpacked.
    pub size: u64,
    pub packing: Compression,
}

/// How a record's bytes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Plain,
    Deflated,
    /// Quantised in blocks, which unpack to F32.
    Blocks(GgmlDType),
}

/// The values of one tensor: runs of bytes at regular distances in a record.
#[derive(Debug, Clone)]
pub(crate) struct StorageView {
    record: FileRange,
    /// The first value, counted in the unpacked record.
    start: u64,
    /// Extents and strides in bytes of the axes along which runs repeat, outermost first; none if all is one run.
    axes: Vec<(u64, u64)>,
    /// Length of a run.
    run: u64,
}

impl StorageView {
    /// All of `bytes`, one after another.
    pub fn whole(bytes: Range<u64>) -> Self {
        let size = bytes.end - bytes.start;
        Self::of(FileRange { bytes, size, packing: Compression::Plain })
    }

    /// All of `record`, unpacked.
    pub fn of(record: FileRange) -> Self {
        let run = record.size;
        Self { record, start: 0, axes: Vec::new(), run }
    }

    /// Values of `width` bytes from `start` on, along `axes` of extents and strides in bytes. The record must hold them
    /// all and their size must be countable.
    pub fn strided(record: FileRange, start: u64, mut axes: Vec<(u64, u64)>, width: u64) -> Self {
        if axes.iter().any(|&(extent, _)| extent == 0) {
            return Self { record, start: 0, axes: Vec::new(), run: 0 };
        }
        axes.retain(|&(extent, _)| extent != 1);
        let mut run = width;
        while let Some((extent, _)) = axes.pop_if(|&mut (_, stride)| stride == run) {
            run *= extent;
        }
        Self { record, start, axes, run }
    }

    /// Bytes that the values take.
    pub fn size(&self) -> u64 {
        self.axes.iter().map(|(extent, _)| extent).product::<u64>() * self.run
    }

    /// The format and the bytes of the blocks that the values are packed in, where they are.
    pub fn blocks(&self) -> Option<(GgmlDType, u64)> {
        match self.record.packing {
            Compression::Blocks(format) => Some((format, self.record.bytes.end - self.record.bytes.start)),
            Compression::Plain | Compression::Deflated => None,
        }
    }

    /// Reads the bytes `range` of the values in row-major order.
    pub fn read(&self, file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
        match self.axes[..] {
            [] => self.record.read(file, self.start + range.start..self.start + range.end),
            _ if range.is_empty() => Ok(Vec::new()),
            [(rows, stride), ref inner @ ..] => self.gather(file, range, (self.size() / rows, stride, inner)),
        }
    }

    /// Reads what the rows of `range` span at once: values apart from one another would cost a read each.
    fn gather(&self, file: &File, range: Range<u64>, rows: (u64, u64, &[(u64, u64)])) -> io::Result<Vec<u8>> {
        let (row, stride, inner) = rows;
        let (first, end) = (range.start / row, range.end.div_ceil(row));
        let reach = inner.iter().map(|(extent, stride)| (extent - 1) * stride).sum::<u64>() + self.run;
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
            [(extent, stride), inner @ ..] => {
                (0..*extent).for_each(|index| self.collect(span, at + index * stride, inner, values));
            }
        }
    }
}

impl FileRange {
    /// Reads the bytes `range` of the unpacked record.
    pub fn read(&self, file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
        let length = range.end - range.start;
        match self.packing {
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
        let (block, packed) = (format.block_size() as u64 * F32_BYTES, format.type_size() as u64);
        let (first, end) = (range.start / block, range.end.div_ceil(block));
        let mut values = Vec::with_capacity(((end - first) * block) as usize);
        for start in (first..end).step_by(MOST_BLOCKS) {
            let count = (end - start).min(MOST_BLOCKS as u64);
            let blocks = files::read_at(file, self.bytes.start + start * packed, (count * packed) as usize)?;
            values.extend(unblock(blocks, format).map_err(io::Error::other)?);
        }
        values.truncate((range.end - first * block) as usize);
        values.drain(..(range.start - first * block) as usize);
        Ok(values)
    }
}

/// The F32 values that whole blocks stand for. Blocks need the alignment of 16 bits, which every allocation of their
/// size has.
fn unblock(blocks: Vec<u8>, format: GgmlDType) -> candle_core::Result<Vec<u8>> {
    let values = blocks.len() / format.type_size() * format.block_size();
    let storage = QStorage::from_data(Cow::Owned(blocks), &Device::Cpu, format)?;
    let values = QTensor::new(storage, values)?.dequantize(&Device::Cpu)?;
    Ok(values.data().into_owned())
}

/// Reads a part of a file from its beginning to its end.
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
    fn values_come_in_row_major_order_from_any_strides() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&(0..24).collect::<Vec<u8>>()).unwrap();
        type Axes<'a> = &'a [(u64, u64)];
        let cases: [(&str, u64, Axes, u64, &[u8]); 8] = [
            ("whole", 0, &[(2, 2), (2, 1)], 1, &[0, 1, 2, 3]),
            ("transposed", 0, &[(2, 1), (3, 2)], 1, &[0, 2, 4, 1, 3, 5]),
            ("transposed pairs", 2, &[(2, 2), (3, 4)], 2, &[2, 3, 6, 7, 10, 11, 4, 5, 8, 9, 12, 13]),
            ("columns", 1, &[(3, 6), (2, 1)], 1, &[1, 2, 7, 8, 13, 14]),
            ("expanded", 3, &[(3, 0), (2, 1)], 1, &[3, 4, 3, 4, 3, 4]),
            ("extents of 1", 4, &[(1, 999), (2, 4), (1, 7)], 4, &[4, 5, 6, 7, 8, 9, 10, 11]),
            ("no axes", 5, &[], 2, &[5, 6]),
            ("nothing", 99, &[(u64::MAX, 1), (0, 1)], 4, &[]),
        ];
        for (name, start, axes, width, expected) in cases {
            let record = FileRange { bytes: 0..24, size: 24, packing: Compression::Plain };
            let place = StorageView::strided(record, start, axes.to_vec(), width);
            assert_eq!(place.size(), expected.len() as u64, "{name}");
            for from in 0..=expected.len() {
                for to in from..=expected.len() {
                    let read = place.read(&file, from as u64..to as u64).unwrap();
                    assert_eq!(read, expected[from..to], "{name} {from}..{to}");
                }
            }
        }
    }
}
