//! [`GgufType`]: the types of tensors in GGUF files (`ggml_type`), by number and name. Blocks are dequantised by
//! candle.

use crate::Dtype;
use crate::error::Validated;
use crate::storage_view::Compression;
use candle_core::quantized::GgmlDType;

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GgufType {
    /// In a dtype of safetensors.
    Plain(Dtype),
    /// In quantised blocks.
    Blocks(GgmlDType),
}

/// (number in the file, name, how values are stored), sorted by number. Types that are not supported have a name only,
/// for the error.
const FORMATS: &[(u64, &str, Option<GgufType>)] = &[
    (0, "F32", Some(GgufType::Plain(Dtype::F32))),
    (1, "F16", Some(GgufType::Plain(Dtype::F16))),
    (2, "Q4_0", Some(GgufType::Blocks(GgmlDType::Q4_0))),
    (3, "Q4_1", Some(GgufType::Blocks(GgmlDType::Q4_1))),
    (6, "Q5_0", Some(GgufType::Blocks(GgmlDType::Q5_0))),
    (7, "Q5_1", Some(GgufType::Blocks(GgmlDType::Q5_1))),
    (8, "Q8_0", Some(GgufType::Blocks(GgmlDType::Q8_0))),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(GgufType::Blocks(GgmlDType::Q2K))),
    (11, "Q3_K", Some(GgufType::Blocks(GgmlDType::Q3K))),
    (12, "Q4_K", Some(GgufType::Blocks(GgmlDType::Q4K))),
    (13, "Q5_K", Some(GgufType::Blocks(GgmlDType::Q5K))),
    (14, "Q6_K", Some(GgufType::Blocks(GgmlDType::Q6K))),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", Some(GgufType::Plain(Dtype::I8))),
    (25, "I16", Some(GgufType::Plain(Dtype::I16))),
    (26, "I32", Some(GgufType::Plain(Dtype::I32))),
    (27, "I64", Some(GgufType::Plain(Dtype::I64))),
    (28, "F64", Some(GgufType::Plain(Dtype::F64))),
    (29, "IQ1_M", None),
    (30, "BF16", Some(GgufType::Plain(Dtype::BF16))),
    (31, "Q4_0_4_4", None),
    (32, "Q4_0_4_8", None),
    (33, "Q4_0_8_8", None),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
    (40, "NVFP4", None),
    (41, "Q1_0", None),
];
const REMEDY: &str = "use the file in Q8_0, a K-quant or BF16, or the safetensors file it was made from";

impl GgufType {
    /// The type of a number in the file, and its name.
    pub fn numbered(number: u64) -> Validated<(&'static str, Self)> {
        match FORMATS.binary_search_by_key(&number, |format| format.0).map(|at| FORMATS[at]) {
            Ok((_, name, Some(stored))) => Ok((name, stored)),
            Ok((_, name, None)) => Err(format!("type {name} is not supported: {REMEDY}")),
            Err(_) => Err(format!("unknown type {number}: {REMEDY}")),
        }
    }

    /// The name of a type of blocks.
    pub fn name_of(blocks: GgmlDType) -> &'static str {
        let named = FORMATS.iter().find(|format| format.2 == Some(Self::Blocks(blocks)));
        named.map_or("blocks", |format| format.1)
    }

    /// The type of blocks with this name, in letters of either case.
    pub fn blocks_named(name: &str) -> Option<GgmlDType> {
        FORMATS.iter().find_map(|format| match format.2 {
            Some(Self::Blocks(blocks)) if format.1.eq_ignore_ascii_case(name) => Some(blocks),
            _ => None,
        })
    }

    /// Its number in files; none for a dtype that GGUF does not have.
    pub fn number(self) -> Option<u32> {
        FORMATS.iter().find(|format| format.2 == Some(self)).map(|format| format.0 as u32)
    }

    /// (values, bytes) of a block; a plain value is a block of one.
    pub fn block(self) -> (u64, u64) {
        match self {
            Self::Plain(dtype) => (1, dtype.bitsize() as u64 / 8),
            Self::Blocks(format) => (format.block_size() as u64, format.type_size() as u64),
        }
    }

    /// The dtype that the values are read in.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::Plain(dtype) => dtype,
            Self::Blocks(_) => Dtype::F32,
        }
    }

    /// How the values are unpacked.
    pub fn compression(self) -> Compression {
        match self {
            Self::Plain(_) => Compression::Plain,
            Self::Blocks(format) => Compression::Blocks(format),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn types_are_sorted_and_blocks_have_the_sizes_in_files() {
        assert!(FORMATS.is_sorted_by(|a, b| a.0 < b.0));
        let cases = [
            ("F16", 1, 2),
            ("Q4_0", 32, 18),
            ("Q4_1", 32, 20),
            ("Q5_0", 32, 22),
            ("Q5_1", 32, 24),
            ("Q8_0", 32, 34),
            ("Q2_K", 256, 84),
            ("Q3_K", 256, 110),
            ("Q4_K", 256, 144),
            ("Q5_K", 256, 176),
            ("Q6_K", 256, 210),
            ("I64", 1, 8),
            ("BF16", 1, 2),
        ];
        for (name, values, bytes) in cases {
            let stored = FORMATS.iter().find(|format| format.1 == name).unwrap().2.unwrap();
            assert_eq!(stored.block(), (values, bytes), "{name}");
        }
    }
}
