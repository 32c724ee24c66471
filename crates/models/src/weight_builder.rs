//! [`WeightBuilder`]: a tensor source seen from one module of a model, and [`Linear`], the layer all of them have. They know
//! no architecture.

use crate::Result;
use candle_core::{DType, Tensor};
use clearform_weights::{LowRank, TensorSource, WeightsError};

/// A source seen from the module `prefix`: names are relative to it.
#[derive(Clone)]
pub(crate) struct WeightBuilder<'a> {
    source: &'a dyn TensorSource,
    prefix: String,
    dtype: Option<DType>,
}

/// x wᵀ + b, and what an adapter adds beside it.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    beside: Vec<LowRank>,
}

impl<'a> WeightBuilder<'a> {
    /// All of `source`, in the number formats it has.
    pub(crate) fn root(source: &'a dyn TensorSource) -> Self {
        Self { source, prefix: String::new(), dtype: None }
    }

    /// The same, with every tensor converted to `dtype`.
    pub(crate) fn in_dtype(self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// The submodule `name`.
    pub(crate) fn pp(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.source.info(&self.full_name(name)).is_some()
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        self.converted(self.source.tensor(&self.full_name(name))?)
    }

    /// As [`Self::tensor`], and its extents are `shape`.
    pub(crate) fn shaped(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensor(name)?;
        if tensor.dims() == shape {
            return Ok(tensor);
        }
        let found = tensor.dims();
        let reason = format!("expected shape {shape:?}, found {found:?}; config.json may belong to another model");
        Err(WeightsError::BadTensor { name: self.full_name(name), reason }.into())
    }

    /// The layer `name`: its weight, and its bias where it has one.
    pub(crate) fn linear(&self, name: &str) -> Result<Linear> {
        let builder = self.pp(name);
        let bias = if builder.has("bias") { Some(builder.tensor("bias")?) } else { None };
        let (weight, beside) = self.source.low_rank_terms(&builder.full_name("weight"))?;
        Ok(Linear { weight: self.converted(weight)?, bias, beside })
    }

    /// Converting makes a new tensor, and a trained one must stay the very variable that the optimizer steps.
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
    /// The same layer of a convolution's weight: its inputs are all extents but the first.
    pub(crate) fn flattened(self) -> candle_core::Result<Self> {
        let flat = |LowRank { down, up, scale }: LowRank| -> candle_core::Result<LowRank> {
            Ok(LowRank { down: down.flatten_from(1)?, up: up.flatten_from(1)?, scale })
        };
        let beside = self.beside.into_iter().map(flat).collect::<candle_core::Result<_>>()?;
        Ok(Self { weight: self.weight.flatten_from(1)?, bias: self.bias, beside })
    }

    /// # Shapes
    /// x (.., inputs) -> (.., outputs).
    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut y = clearform_ops::linear(x, &self.weight, self.bias.as_ref())?;
        for LowRank { down, up, scale } in &self.beside {
            let inner = (clearform_ops::linear(x, down, None)? * *scale)?; // (.., rank)
            y = (y + clearform_ops::linear(&inner, up, None)?)?;
        }
        Ok(y)
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
