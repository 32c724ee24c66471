//! [`QuantizedMatrix`]: a matrix as its file stores it. It stays that way in memory and is dequantised by rows where it is
//! multiplied.

use crate::{Fp8, Result, WeightsError};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, GgmlType,
};
use candle_core::{Device, Tensor};
use half::bf16;

/// How the values of a matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantizedFormat {
    /// In GGUF's blocks, of which rows are a whole number.
    Blocks(GgmlDType),
    /// In fp8, with a scale for all rows or one for each. Values times scale are rounded to bf16.
    Fp8(Fp8),
}

/// A matrix in a quantised format.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedMatrix {
    format: QuantizedFormat,
    rows: usize,
    columns: usize,
    /// Row-major.
    bytes: Vec<u8>,
    /// What the rows are multiplied by: one for each, one for all, or none.
    scales: Vec<f32>,
}

impl QuantizedMatrix {
    /// A matrix of (rows, columns) in `format`, with as many `scales` as there are rows, one, or none.
    ///
    /// # Errors
    /// [`WeightsError::BadTensor`] if the number of bytes or scales does not match the shape.
    pub fn new(format: QuantizedFormat, [rows, columns]: [usize; 2], bytes: Vec<u8>, scales: Vec<f32>) -> Result<Self> {
        let expected = format.row_bytes(columns).and_then(|row| row.checked_mul(rows));
        if expected != Some(bytes.len()) || ![0, 1, rows].contains(&scales.len()) {
            let reason = format!(
                "expected ({rows}, {columns}) in {format:?}, found {} bytes and {} scales",
                bytes.len(),
                scales.len()
            );
            return Err(WeightsError::BadTensor { name: "a quantised matrix".to_owned(), reason });
        }
        Ok(Self { format, rows, columns, bytes, scales })
    }

    /// Its format.
    pub fn format(&self) -> QuantizedFormat {
        self.format
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Its bytes without the scales, row-major.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Bytes that it takes in memory.
    pub fn byte_count(&self) -> usize {
        self.bytes.len() + size_of::<f32>() * self.scales.len()
    }

    /// The rows of all `parts` in order; `None` if they are none, or of several formats or widths.
    pub fn joined(parts: Vec<Self>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let mut all = parts.next()?;
        for part in parts {
            if (part.format, part.columns) != (all.format, all.columns) {
                return None;
            }
            if all.scales != part.scales || all.scales.len() > 1 {
                all.scales = [all.scale_of_each_row(), part.scale_of_each_row()].concat();
            }
            all.rows += part.rows;
            all.bytes.extend(part.bytes);
        }
        Some(all)
    }

    fn scale_of_each_row(&self) -> Vec<f32> {
        (0..self.rows).map(|row| self.scale(row)).collect()
    }

    fn scale(&self, row: usize) -> f32 {
        match self.scales[..] {
            [] => 1.0,
            [scale] => scale,
            ref scales => scales[row],
        }
    }

    /// Writes the values of some rows, from `first` on, to `out`, which has whole rows.
    ///
    /// # Panics
    /// There are no such rows.
    pub fn dequantize(&self, first: usize, out: &mut [f32]) {
        if self.columns == 0 {
            return;
        }
        let row_bytes = self.bytes.len() / self.rows.max(1);
        let count = out.len() / self.columns;
        let bytes = &self.bytes[first * row_bytes..(first + count) * row_bytes];
        match self.format {
            QuantizedFormat::Blocks(format) => dequantize_blocks(format, bytes, out),
            QuantizedFormat::Fp8(format) => {
                let rows = bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(self.columns));
                let mut table = (f32::NAN, [0.0; 256]);
                for (row, (bytes, out)) in rows.enumerate() {
                    let scale = self.scale(first + row);
                    if table.0 != scale {
                        table = (scale, scaled_values(format, scale));
                    }
                    out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = table.1[usize::from(*byte)]);
                }
            }
        }
    }

    /// All values, (rows, columns) in f32.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let mut values = vec![0.0; self.rows * self.columns];
        self.dequantize(0, &mut values);
        Ok(Tensor::from_vec(values, (self.rows, self.columns), &Device::Cpu)?)
    }
}

impl QuantizedFormat {
    /// Bytes of a row of `columns` values; `None` if it is no whole number of blocks.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        match self {
            Self::Fp8(_) => Some(columns),
            Self::Blocks(format) => {
                let blocks = columns.is_multiple_of(format.block_size()).then(|| columns / format.block_size());
                blocks.map(|blocks| blocks * format.type_size())
            }
        }
    }
}

/// Every value of `format` times `scale`, rounded to bf16.
fn scaled_values(format: Fp8, scale: f32) -> [f32; 256] {
    let bytes: [u8; 256] = std::array::from_fn(|byte| byte as u8);
    let rounded = format.to_bf16(&bytes, scale);
    std::array::from_fn(|byte| bf16::from_le_bytes([rounded[2 * byte], rounded[2 * byte + 1]]).to_f32())
}

/// Values of whole blocks.
fn dequantize_blocks(format: GgmlDType, bytes: &[u8], out: &mut [f32]) {
    match format {
        GgmlDType::Q4_0 => unpack::<BlockQ4_0>(bytes, out),
        GgmlDType::Q4_1 => unpack::<BlockQ4_1>(bytes, out),
        GgmlDType::Q5_0 => unpack::<BlockQ5_0>(bytes, out),
        GgmlDType::Q5_1 => unpack::<BlockQ5_1>(bytes, out),
        GgmlDType::Q8_0 => unpack::<BlockQ8_0>(bytes, out),
        GgmlDType::Q2K => unpack::<BlockQ2K>(bytes, out),
        GgmlDType::Q3K => unpack::<BlockQ3K>(bytes, out),
        GgmlDType::Q4K => unpack::<BlockQ4K>(bytes, out),
        GgmlDType::Q5K => unpack::<BlockQ5K>(bytes, out),
        GgmlDType::Q6K => unpack::<BlockQ6K>(bytes, out),
        // Plain values are no blocks, and no file holds the others.
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 | GgmlDType::Q8K => {
            unreachable!("{format:?} is no format of weights")
        }
    }
}

fn unpack<B: GgmlType>(bytes: &[u8], out: &mut [f32]) {
    let count = bytes.len() / size_of::<B>();
    let start = bytes.as_ptr();
    if start.cast::<B>().is_aligned() {
        // SAFETY: the blocks lie within `bytes`, are aligned, and consist of integers and f16, for which any bits are
        // values.
        B::to_float(unsafe { std::slice::from_raw_parts(start.cast::<B>(), count) }, out);
    } else {
        let mut aligned: Vec<B> = (0..count).map(|_| B::zeros()).collect();
        // SAFETY: `aligned` has as many bytes, and any bits are values of a block.
        unsafe { std::ptr::copy_nonoverlapping(start, aligned.as_mut_ptr().cast::<u8>(), count * size_of::<B>()) };
        B::to_float(&aligned, out);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::quantized::QTensor;

    const FORMATS: [GgmlDType; 10] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    /// The values are candle's, for any rows, and for bytes at an odd address.
    #[test]
    fn rows_of_blocks_are_what_candle_dequantises() {
        let x = Tensor::randn(0f32, 1.0, (5, 512), &Device::Cpu).unwrap();
        for format in FORMATS {
            let quantized = QTensor::quantize(&x, format).unwrap();
            let wanted = quantized.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
            let bytes = quantized.data().unwrap().to_vec();
            let row = bytes.len() / 5;
            let matrix = QuantizedMatrix::new(QuantizedFormat::Blocks(format), [5, 512], bytes.clone(), Vec::new());
            let mut out = vec![0.0; 2 * 512];
            matrix.unwrap().dequantize(3, &mut out);
            assert_eq!(out, wanted[3..].concat(), "{format:?}");
            let odd = [&[0], &bytes[3 * row..]].concat();
            dequantize_blocks(format, &odd[1..], &mut out);
            assert_eq!(out, wanted[3..].concat(), "{format:?}");
        }
    }

    #[test]
    fn fp8_rows_have_their_scales() {
        let bytes: Vec<u8> = (0..6).map(|byte| 40 + 9 * byte).collect();
        let format = QuantizedFormat::Fp8(Fp8::E4M3);
        let matrix = QuantizedMatrix::new(format, [3, 2], bytes.clone(), vec![1.0, 0.37, -2.0]).unwrap();
        let values = matrix.to_tensor().unwrap().to_vec2::<f32>().unwrap();
        for (row, scale) in [1.0f32, 0.37, -2.0].into_iter().enumerate() {
            let exact = |byte: u8| bf16::from_f64(f64::from(Fp8::E4M3.value(byte)) * f64::from(scale)).to_f32();
            assert_eq!(values[row], [exact(bytes[2 * row]), exact(bytes[2 * row + 1])]);
        }
    }

    #[test]
    fn rows_of_one_format_are_joined() {
        let format = QuantizedFormat::Fp8(Fp8::E5M2);
        let part = |rows: usize, byte: u8, scales: &[f32]| {
            QuantizedMatrix::new(format, [rows, 2], vec![byte; 2 * rows], scales.to_vec()).unwrap()
        };
        let joined = QuantizedMatrix::joined(vec![part(1, 60, &[]), part(2, 62, &[0.5]), part(1, 60, &[2.0])]).unwrap();
        assert_eq!(joined.to_tensor().unwrap().to_vec2::<f32>().unwrap(), [[1.0; 2], [0.75; 2], [0.75; 2], [2.0; 2]]);
        assert_eq!(QuantizedMatrix::joined(vec![part(1, 60, &[3.0]), part(1, 60, &[3.0])]).unwrap().scales, [3.0]);
        let other = QuantizedMatrix::new(QuantizedFormat::Fp8(Fp8::E4M3), [1, 2], vec![1; 2], Vec::new()).unwrap();
        assert_eq!(QuantizedMatrix::joined(vec![part(1, 60, &[]), other]), None);
        assert_eq!(QuantizedMatrix::joined(Vec::new()), None);
    }

    #[test]
    fn bytes_must_match_the_shape() {
        let blocks = QuantizedFormat::Blocks(GgmlDType::Q8_0);
        assert!(QuantizedMatrix::new(blocks, [2, 32], vec![0; 68], Vec::new()).is_ok());
        for (shape, bytes) in [([2, 32], 67), ([2, 31], 68), ([usize::MAX, 32], 68)] {
            assert!(QuantizedMatrix::new(blocks, shape, vec![0; bytes], Vec::new()).is_err());
        }
        let fp8 = QuantizedFormat::Fp8(Fp8::E4M3);
        assert!(QuantizedMatrix::new(fp8, [3, 1], vec![0; 3], vec![1.0; 2]).is_err());
    }
}
