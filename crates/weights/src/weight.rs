//! [`Weight`]: the weight of a linear layer, its stored values with the low-rank terms of adapters beside them.

use crate::{QuantizedMatrix, Result};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// How f32 activations are multiplied, by weights and with each other in attention.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProductPrecision {
    /// In f32.
    #[default]
    Full,
    /// Rounded to bf16 where the processor multiplies pairs of them, in f32 where it does not; sums are f32. This is
    /// `torch.set_float32_matmul_precision("medium")`.
    Bf16,
}

/// The weight of a linear layer: `base` plus all `low_rank` terms. Their sum is not formed: a caller adds the products
/// of the terms to the product of the base, which is cheap and rounds nothing to the base's dtype.
#[derive(Debug, Clone)]
pub struct Weight {
    /// The stored values.
    pub base: BaseWeight,
    /// The terms that adapters add; most weights have none.
    pub low_rank: Vec<LowRank>,
    /// The precision of products with `base`.
    pub products: ProductPrecision,
}

/// The stored values of a weight, in the form in which they are multiplied.
#[derive(Debug, Clone)]
pub enum BaseWeight {
    /// A tensor in its stored dtype: (outputs, inputs), or (outputs, channels, height, width) of a convolution. It shares
    /// its storage with the source that holds it; a trained one is the variable that the optimizer updates.
    Dense(Tensor),
    /// A matrix of (outputs, inputs) in a quantised format, on the CPU.
    Quantized(Arc<QuantizedMatrix>),
}

impl BaseWeight {
    /// Its shape, outputs first.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Dense(tensor) => tensor.dims().to_vec(),
            Self::Quantized(matrix) => matrix.shape().to_vec(),
        }
    }

    /// The dtype of low-rank terms beside it: its own, or f32 beside a quantised one.
    pub fn term_dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) => tensor.dtype(),
            Self::Quantized(_) => DType::F32,
        }
    }

    /// The device that it is on.
    pub fn device(&self) -> &Device {
        match self {
            Self::Dense(tensor) => tensor.device(),
            Self::Quantized(_) => &Device::Cpu,
        }
    }

    /// Its values as a tensor, dequantised to f32 if it is quantised.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn to_tensor(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Quantized(matrix) => matrix.to_tensor(),
        }
    }
}

/// A low-rank term of a weight, scale · up · down, kept as its factors.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// (rank, inputs).
    pub down: Tensor,
    /// (outputs, rank).
    pub up: Tensor,
    /// What the product is multiplied by.
    pub scale: f64,
}

/// A tensor as a weight without low-rank terms.
impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self { base: BaseWeight::Dense(tensor), low_rank: Vec::new(), products: ProductPrecision::Full }
    }
}

/// A quantised matrix as a weight without low-rank terms.
impl From<QuantizedMatrix> for Weight {
    fn from(matrix: QuantizedMatrix) -> Self {
        let base = BaseWeight::Quantized(Arc::new(matrix));
        Self { base, low_rank: Vec::new(), products: ProductPrecision::Full }
    }
}
