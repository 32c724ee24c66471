//! [`RandomWeights`]: the weights of a model of given shapes, made up as they are read, in any format that files have.

use crate::{ClearformError, Result};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use clearform_layout::ExpectedTensor;
use clearform_sampling::TorchGenerator;
use clearform_weights::{
    Fp8, QuantizedFormat, QuantizedMatrix, RawTensor, TensorInfo, TensorSource, WeightsError, block_format_for,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Different values; tensors repeat them, each from another place on.
const POOL: usize = 1 << 16;

/// Standard deviation of the values.
const SPREAD: f64 = 0.02;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum WeightFormat {
    /// In a dtype that is computed with.
    Dense(DType),
    /// Matrices in fp8 or in GGUF's blocks, the rest in f32.
    Quantized(QuantizedFormat),
}

/// Names of formats, as stable-diffusion.cpp's `--type` has them.
const FORMATS: [(&str, WeightFormat); 14] = [
    ("f32", WeightFormat::Dense(DType::F32)),
    ("bf16", WeightFormat::Dense(DType::BF16)),
    ("fp8_e4m3fn", WeightFormat::Quantized(QuantizedFormat::Fp8(Fp8::E4M3))),
    ("fp8_e5m2", WeightFormat::Quantized(QuantizedFormat::Fp8(Fp8::E5M2))),
    ("q4_0", blocks(GgmlDType::Q4_0)),
    ("q4_1", blocks(GgmlDType::Q4_1)),
    ("q5_0", blocks(GgmlDType::Q5_0)),
    ("q5_1", blocks(GgmlDType::Q5_1)),
    ("q8_0", blocks(GgmlDType::Q8_0)),
    ("q2_k", blocks(GgmlDType::Q2K)),
    ("q3_k", blocks(GgmlDType::Q3K)),
    ("q4_k", blocks(GgmlDType::Q4K)),
    ("q5_k", blocks(GgmlDType::Q5K)),
    ("q6_k", blocks(GgmlDType::Q6K)),
];

const fn blocks(format: GgmlDType) -> WeightFormat {
    WeightFormat::Quantized(QuantizedFormat::Blocks(format))
}

impl FromStr for WeightFormat {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wanted = text.to_ascii_lowercase();
        let found = FORMATS.iter().find(|(name, _)| *name == wanted);
        let names = || FORMATS.map(|(name, _)| name).join(", ");
        found.map(|(_, format)| *format).ok_or_else(|| format!("expected one of {}", names()))
    }
}

impl TryFrom<String> for WeightFormat {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<WeightFormat> for String {
    fn from(format: WeightFormat) -> Self {
        format.to_string()
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(FORMATS.iter().find(|(_, format)| format == self).map_or("other", |(name, _)| name))
    }
}

/// Random tensors of given names and shapes.
pub struct RandomWeights {
    shapes: BTreeMap<String, Vec<usize>>,
    format: WeightFormat,
    values: Vec<f32>,
    /// The values in the format, and in those of rows that it does not divide; empty if it is a dtype.
    blocks: Vec<(QuantizedFormat, Vec<u8>)>,
}

/// Values in the blocks of formats other than the K formats.
const SMALL_BLOCK: usize = 32;

impl RandomWeights {
    /// The tensors `expected` of a model, those apart that it may lack.
    ///
    /// # Errors
    /// A tensor whose shape is not determined.
    pub fn new(expected: Vec<ExpectedTensor>, format: WeightFormat) -> Result<Self> {
        let shape = |tensor: ExpectedTensor| {
            let shape: Option<Vec<usize>> = tensor.shape.into_iter().collect();
            let named = shape.map(|shape| (tensor.name.clone(), shape));
            named.ok_or_else(|| ClearformError::bad_option(format!("{}: its shape is not determined", tensor.name)))
        };
        let needed = expected.into_iter().filter(|tensor| !tensor.optional);
        let values = (TorchGenerator::new(0).randn(POOL)? * SPREAD)?;
        let blocks = match format {
            WeightFormat::Dense(_) => Vec::new(),
            WeightFormat::Quantized(QuantizedFormat::Blocks(format)) => {
                // Rows of one small block are divided by the format that stands in for a K format.
                let formats = [Some(format), block_format_for(format, SMALL_BLOCK)];
                let blocks = formats.into_iter().flatten().map(|format| {
                    Ok((QuantizedFormat::Blocks(format), QTensor::quantize(&values, format)?.data()?.to_vec()))
                });
                blocks.collect::<candle_core::Result<_>>()?
            }
            // Values of about 1, to which a scale is given.
            WeightFormat::Quantized(fp8) => {
                vec![(fp8, (0..POOL).map(|index| (index * 89 % 64) as u8).collect())]
            }
        };
        let values = values.to_vec1()?;
        Ok(Self { shapes: needed.map(shape).collect::<Result<_>>()?, format, values, blocks })
    }

    fn shape(&self, name: &str) -> clearform_weights::Result<&[usize]> {
        let missing = || WeightsError::Missing { name: name.to_owned() };
        self.shapes.get(name).map(Vec::as_slice).ok_or_else(missing)
    }

    fn dtype(&self) -> DType {
        match self.format {
            WeightFormat::Dense(dtype) => dtype,
            WeightFormat::Quantized(_) => DType::F32,
        }
    }
}

impl TensorSource for RandomWeights {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.shapes.keys().filter_map(|name| self.info(name)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let shape = self.shapes.get(name)?.clone();
        Some(TensorInfo { name: name.to_owned(), dtype: self.dtype().into(), shape })
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        RawTensor::of(&self.tensor(name)?)
    }

    fn tensor(&self, name: &str) -> clearform_weights::Result<Tensor> {
        let shape = self.shape(name)?;
        let count = shape.iter().product();
        let values = repeated(&self.values, start(name), count);
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(self.dtype())?)
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> clearform_weights::Result<Option<QuantizedMatrix>> {
        let [_, columns] = self.shape(name)? else { return Ok(None) };
        let found = self.blocks.iter().find_map(|(format, blocks)| Some((format, blocks, format.row_bytes(*columns)?)));
        let Some((format, blocks, row)) = found else { return Ok(None) };
        let (block, scales) = match format {
            QuantizedFormat::Blocks(format) => (format.type_size(), Vec::new()),
            QuantizedFormat::Fp8(_) => (1, vec![SPREAD as f32]),
        };
        let first = (start(name) * block + rows.start * row) % blocks.len();
        let bytes = repeated(blocks, first, rows.len() * row);
        QuantizedMatrix::new(*format, [rows.len(), *columns], bytes, scales).map(Some)
    }
}

/// `count` values of `pool` from `first` on, which begins again at its end.
fn repeated<T: Copy>(pool: &[T], first: usize, count: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    let mut rest = &pool[first..];
    while values.len() < count {
        values.extend_from_slice(&rest[..rest.len().min(count - values.len())]);
        rest = pool;
    }
    values
}

/// Where in the pool a tensor begins.
fn start(name: &str) -> usize {
    name.bytes().fold(7, |sum: usize, byte| (sum * 31 + usize::from(byte)) % (POOL / 256))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clearform_attention::{AttentionPlan, TokenGrid};
    use clearform_layout::Manifests;
    use clearform_models::families::flux::Flux;
    use clearform_models::{DenoiserInput, InputSizes, ModelFamily as _, random_input};
    use clearform_weights::{ConvertedSource, InMemoryTensors};
    use std::sync::Arc;

    /// A FLUX of two blocks in every format: the forward in bf16 against that in f32 of the values that the weights stand
    /// for. It differs by little more than with those values in bf16.
    #[test]
    fn formats_cost_no_more_than_rounding() {
        let config = serde_json::json!({
            "in_channels": 64, "out_channels": 64, "joint_attention_dim": 256, "pooled_projection_dim": 256,
            "num_layers": 1, "num_single_layers": 1, "guidance_embeds": true, "attention_head_dim": 128,
            "num_attention_heads": 2, "width": 256, "axes_dims_rope": [16, 56, 56],
        });
        let architecture = Flux.parse(&config).unwrap();
        let grid = TokenGrid::new(8, 8).unwrap();
        let sizes = |dtype| InputSizes { grid, text: 8, dtype, device: Device::Cpu };
        let input = random_input(architecture.as_ref(), &sizes(DType::F32)).unwrap();
        let in_bf16 = DenoiserInput { latents: input.latents.to_dtype(DType::BF16).unwrap(), ..input.clone() };
        let forward = |source: &dyn TensorSource, input: &DenoiserInput| {
            let model = architecture.build(source, &AttentionPlan::full()).unwrap();
            model.forward(input).unwrap().to_dtype(DType::F32).unwrap()
        };
        let manifests = Manifests::embedded().unwrap();
        for (name, format) in FORMATS.into_iter().filter(|(_, format)| matches!(format, WeightFormat::Quantized(_))) {
            let weights = Arc::new(RandomWeights::new(manifests.expected("flux", &config).unwrap(), format).unwrap());
            let plain: InMemoryTensors = weights
                .tensors()
                .into_iter()
                .map(|info| {
                    let rows = info.shape[0];
                    let matrix = weights.quantized_rows(&info.name, 0..rows);
                    let matrix = if info.shape.len() == 2 { matrix.unwrap() } else { None };
                    let tensor =
                        matrix.map_or_else(|| weights.tensor(&info.name), |matrix| matrix.to_tensor()).unwrap();
                    (info.name, tensor.to_dtype(DType::F32).unwrap())
                })
                .collect();
            let exact = forward(&plain, &input);
            let error = |got: Tensor| {
                let norm =
                    |tensor: &Tensor| tensor.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
                norm(&(got - &exact).unwrap()) / norm(&exact)
            };
            let quantized = error(forward(&ConvertedSource::new(weights, Some(DType::BF16)), &in_bf16));
            let rounded = error(forward(&ConvertedSource::new(Arc::new(plain.clone()), Some(DType::BF16)), &in_bf16));
            assert!(rounded > 0.0 && rounded < 0.5 && quantized <= 2.0 * rounded, "{name}: {quantized} and {rounded}");
        }
    }

    #[test]
    fn matrices_are_in_the_format_and_the_rest_in_f32() {
        let expected = |name: &str, shape: &[usize]| ExpectedTensor {
            name: name.to_owned(),
            shape: shape.iter().copied().map(Some).collect(),
            optional: false,
        };
        for (name, format) in FORMATS {
            assert_eq!(name.parse::<WeightFormat>().unwrap().to_string(), name);
            let tensors = vec![expected("a.weight", &[300, 512]), expected("a.bias", &[300])];
            let weights = RandomWeights::new(tensors, format).unwrap();
            assert_eq!(weights.tensor("a.bias").unwrap().dims(), [300]);
            let matrix = weights.quantized_rows("a.weight", 2..300).unwrap();
            assert_eq!(matrix.is_some(), matches!(format, WeightFormat::Quantized(_)));
            let values = matrix.map_or_else(|| weights.tensor("a.weight"), |matrix| matrix.to_tensor()).unwrap();
            let values = values.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let spread = (values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt();
            assert!(spread > 0.005 && spread < 5.0, "{name}: {spread}");
        }
        assert!("q9_0".parse::<WeightFormat>().unwrap_err().contains("q8_0"));
    }
}
