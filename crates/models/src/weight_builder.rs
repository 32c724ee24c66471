//! [`WeightBuilder`]: reads the weights of a module, as candle's `VarBuilder` does; and [`Linear`].

use crate::Result;
use candle_core::{DType, Tensor};
use clearform_weights::{BaseWeight, LowRank, TensorSource, Weight, WeightsError};

/// A tensor source and a prefix: names are relative to the prefix.
#[derive(Clone)]
pub(crate) struct WeightBuilder<'a> {
    source: &'a dyn TensorSource,
    prefix: String,
    dtype: Option<DType>,
}

/// x wᵀ + b (PyTorch's `nn.Linear`). The weight may have low-rank terms of adapters beside it.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl<'a> WeightBuilder<'a> {
    /// All of `source`. Tensors keep their dtype.
    pub(crate) fn root(source: &'a dyn TensorSource) -> Self {
        Self { source, prefix: String::new(), dtype: None }
    }

    /// Converts every tensor to `dtype`.
    pub(crate) fn in_dtype(self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// The submodule `name` ("push prefix", as in candle).
    pub(crate) fn pp(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.source.info(&self.full_name(name)).is_some()
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        self.converted(self.source.tensor(&self.full_name(name))?)
    }

    /// As [`Self::tensor`]; fails unless its shape is `shape`.
    pub(crate) fn shaped(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensor(name)?;
        self.expect_shape(name, tensor.dims(), shape)?;
        Ok(tensor)
    }

    /// The tensor `name` as it is stored, with the edits of adapters in it; fails unless its shape is `shape`.
    pub(crate) fn base_weight(&self, name: &str, shape: &[usize]) -> Result<BaseWeight> {
        let Weight { base, low_rank, .. } = self.source.weight(&self.full_name(name))?;
        let base = if low_rank.is_empty() { base } else { BaseWeight::Dense(self.tensor(name)?) };
        self.expect_shape(name, &base.shape(), shape)?;
        Ok(base)
    }

    fn expect_shape(&self, name: &str, found: &[usize], shape: &[usize]) -> Result<()> {
        if found == shape {
            return Ok(());
        }
        let reason = format!("expected shape {shape:?}, found {found:?}; config.json may belong to another model");
        Err(WeightsError::BadTensor { name: self.full_name(name), reason }.into())
    }

    /// The linear layer `name`, with its bias if it has one.
    pub(crate) fn linear(&self, name: &str) -> Result<Linear> {
        let builder = self.pp(name);
        let bias = if builder.has("bias") { Some(builder.tensor("bias")?) } else { None };
        Ok(Linear { weight: builder.weight()?, bias })
    }

    /// The linear layer `name` without a bias; fails unless its weight has the shape `shape`.
    pub(crate) fn shaped_linear(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        let builder = self.pp(name);
        let weight = builder.weight()?;
        builder.expect_shape("weight", &weight.base.shape(), &shape)?;
        Ok(Linear { weight, bias: None })
    }

    /// The tensor "weight" with its low-rank terms, which keep their dtype.
    fn weight(&self) -> Result<Weight> {
        let Weight { base, low_rank, .. } = self.source.weight(&self.full_name("weight"))?;
        let base = match base {
            BaseWeight::Dense(tensor) => BaseWeight::Dense(self.converted(tensor)?),
            quantized @ BaseWeight::Quantized(_) => quantized,
        };
        Ok(Weight { base, low_rank, products: self.source.products() })
    }

    /// Does not touch tensors that have the dtype already: a conversion makes a new tensor, and a trained one must stay
    /// the variable that the optimizer updates.
    fn converted(&self, tensor: Tensor) -> Result<Tensor> {
        match self.dtype {
            Some(dtype) if dtype != tensor.dtype() => Ok(tensor.to_dtype(dtype)?),
            _ => Ok(tensor),
        }
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl Linear {
    /// Turns the weight of a convolution whose stride equals its kernel size into that of a linear layer over patches.
    ///
    /// # Shapes
    /// weight (outputs, channels, height, width) -> (outputs, channels · height · width).
    pub(crate) fn flattened(self) -> candle_core::Result<Self> {
        let base = match self.weight.base {
            BaseWeight::Dense(tensor) => BaseWeight::Dense(tensor.flatten_from(1)?),
            // A matrix is flat already.
            quantized @ BaseWeight::Quantized(_) => quantized,
        };
        let flat = |LowRank { down, up, scale }: LowRank| -> candle_core::Result<LowRank> {
            Ok(LowRank { down: down.flatten_from(1)?, up: up.flatten_from(1)?, scale })
        };
        let low_rank = self.weight.low_rank.into_iter().map(flat).collect::<candle_core::Result<_>>()?;
        let weight = Weight { base, low_rank, products: self.weight.products };
        Ok(Self { weight, bias: self.bias })
    }

    /// Channels that it takes.
    pub(crate) fn inputs(&self) -> usize {
        self.weight.base.shape().get(1).copied().unwrap_or(0)
    }

    /// # Shapes
    /// x (.., inputs) -> (.., outputs).
    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        clearform_ops::linear(x, &self.weight, self.bias.as_ref())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;
    use clearform_weights::InMemoryTensors;

    #[test]
    fn a_wrong_shape_is_named_with_the_full_name() {
        let source =
            InMemoryTensors::from_iter([("a.b".to_owned(), Tensor::zeros((2, 3), DType::BF16, &Device::Cpu).unwrap())]);
        let builder = WeightBuilder::root(&source).in_dtype(DType::F32).pp("a");
        assert_eq!(builder.shaped("b", &[2, 3]).unwrap().dtype(), DType::F32);
        let error = builder.shaped("b", &[3, 3]).unwrap_err().to_string();
        assert!(error.contains("\"a.b\": expected shape [3, 3], found [2, 3]"), "{error}");
        assert!(builder.tensor("c").unwrap_err().to_string().contains("\"a.c\" is missing"));
    }
}
