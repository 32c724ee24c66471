//! [`quantize()`]: values in GGUF's blocks. Those of 32 values are candle's; the K formats are fitted here.

mod affine;
mod lanes;
mod packing;
mod symmetric;

use crate::simd::{Isa, SimdKernel, dispatch};
use affine::AffineBlock;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, GgmlType};
use lanes::BlockValues;
use rayon::prelude::*;
use symmetric::SymmetricBlock;

/// Blocks that a thread quantises at a time.
const BLOCKS: usize = 64;

/// `values` in blocks of `format`, in order. The same on every machine.
///
/// # Shapes
/// The values are whole blocks, of 32 values or of 256 in the K formats, and finite.
///
/// # Panics
/// They are no whole number of blocks, or `format` is none of Q4_0 to Q8_0 and Q2_K to Q6_K.
pub fn quantize(format: GgmlDType, values: &[f32]) -> Vec<u8> {
    let (block, bytes) = (format.block_size(), format.type_size());
    assert!(values.len().is_multiple_of(block), "{} values are no whole blocks of {block}", values.len());
    let mut out = vec![0; values.len() / block * bytes];
    let parts = out.par_chunks_mut(BLOCKS * bytes).zip(values.par_chunks(BLOCKS * block));
    parts.for_each(|(out, values)| match format {
        GgmlDType::Q4_0 => candle_blocks::<BlockQ4_0>(values, out),
        GgmlDType::Q4_1 => candle_blocks::<BlockQ4_1>(values, out),
        GgmlDType::Q5_0 => candle_blocks::<BlockQ5_0>(values, out),
        GgmlDType::Q5_1 => candle_blocks::<BlockQ5_1>(values, out),
        GgmlDType::Q8_0 => candle_blocks::<BlockQ8_0>(values, out),
        GgmlDType::Q2K | GgmlDType::Q3K | GgmlDType::Q4K | GgmlDType::Q5K | GgmlDType::Q6K => {
            dispatch(KBlocks { format, values, out });
        }
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 | GgmlDType::Q8K => {
            panic!("{format:?} is no format of weights in blocks")
        }
    });
    out
}

fn candle_blocks<B: GgmlType>(values: &[f32], out: &mut [u8]) {
    let mut blocks: Vec<B> = (0..out.len() / size_of::<B>()).map(|_| B::zeros()).collect();
    B::from_float(values, &mut blocks);
    // SAFETY: blocks consist of integers and f16, without padding, and `out` has as many bytes.
    let bytes = unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast::<u8>(), out.len()) };
    out.copy_from_slice(bytes);
}

/// Whole blocks of a K format.
struct KBlocks<'a> {
    format: GgmlDType,
    values: &'a [f32],
    out: &'a mut [u8],
}

impl SimdKernel for KBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let blocks = self.values.as_chunks().0.iter();
        let out = blocks.zip(self.out.chunks_exact_mut(self.format.type_size()));
        out.for_each(|(values, out): (&[f32; 256], _)| quantize_block(self.format, &lanes::block(values), out));
    }
}

#[inline(always)]
fn quantize_block(format: GgmlDType, values: &BlockValues, out: &mut [u8]) {
    match format {
        GgmlDType::Q2K => packing::q2_k(&AffineBlock::fit::<1>(values, 3, 15), out),
        GgmlDType::Q4K => packing::q4_k(&AffineBlock::fit::<2>(values, 15, 63), out),
        GgmlDType::Q5K => packing::q5_k(&AffineBlock::fit::<2>(values, 31, 63), out),
        GgmlDType::Q3K => packing::q3_k(&SymmetricBlock::fit(values, 4, 32), out),
        _ => packing::q6_k(&SymmetricBlock::fit(values, 32, 128), out),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::TorchGenerator;
    use clearform_weights::{QuantizedFormat, QuantizedMatrix};

    const FORMATS: [(GgmlDType, &str); 10] = [
        (GgmlDType::Q4_0, "Q4_0"),
        (GgmlDType::Q4_1, "Q4_1"),
        (GgmlDType::Q5_0, "Q5_0"),
        (GgmlDType::Q5_1, "Q5_1"),
        (GgmlDType::Q8_0, "Q8_0"),
        (GgmlDType::Q2K, "Q2_K"),
        (GgmlDType::Q3K, "Q3_K"),
        (GgmlDType::Q4K, "Q4_K"),
        (GgmlDType::Q5K, "Q5_K"),
        (GgmlDType::Q6K, "Q6_K"),
    ];

    fn dequantized(format: GgmlDType, bytes: Vec<u8>, count: usize) -> Vec<f32> {
        let shape = [count / 256, 256];
        let matrix = QuantizedMatrix::new(QuantizedFormat::Blocks(format), shape, bytes, Vec::new()).unwrap();
        matrix.to_tensor().unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn error(got: &[f32], wanted: &[f32]) -> f64 {
        let squares = got.iter().zip(wanted).map(|(got, wanted)| f64::from(got - wanted).powi(2));
        (squares.sum::<f64>() / got.len() as f64).sqrt()
    }

    fn values(kind: &str) -> Vec<f32> {
        let normal = TorchGenerator::new(3).randn((256, 256)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let shaped = |x: f32| match kind {
            "normal" => 0.02 * x,
            "heavy" => 0.02 * x * x * x,
            "shifted" => 0.02 * x + 0.03,
            "negative" => -0.1 - 0.001 * x.abs(),
            _ => 1e3 * x,
        };
        normal.into_iter().map(shaped).collect()
    }

    /// tests/fixtures/quantize/export.py measures the errors of llama.cpp's own quantisation.
    #[test]
    fn errors_are_within_two_percent_of_llama_cpps() {
        let text = include_str!("../../../../tests/fixtures/quantize/errors.json");
        let reference: serde_json::Value = serde_json::from_str(text).unwrap();
        for kind in ["normal", "heavy", "shifted", "negative", "large"] {
            let values = values(kind);
            for (format, name) in FORMATS {
                let bytes = quantize(format, &values);
                let ratio =
                    error(&dequantized(format, bytes, values.len()), &values) / reference[kind][name].as_f64().unwrap();
                assert!(ratio < 1.02, "{kind} in {name}: {ratio} of llama.cpp's error");
            }
        }
    }

    #[test]
    fn values_that_a_format_has_are_kept() {
        for (format, name) in FORMATS {
            let zeros = vec![0.0; 512];
            assert_eq!(dequantized(format, quantize(format, &zeros), 512), zeros, "{name}");
            // A lone value is the largest of its block, which every format has but for the rounding of scales.
            let lone: Vec<f32> = (0..256).map(|index| if index == 77 { -0.5 } else { 0.0 }).collect();
            let got = dequantized(format, quantize(format, &lone), 256);
            let off = got.iter().zip(&lone).map(|(got, wanted)| (got - wanted).abs()).fold(0.0, f32::max);
            assert!(off < 4e-3, "{name}: {off}");
        }
    }
}
