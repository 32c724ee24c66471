//! [`ConvertedSource`], [`SourceWithProducts`] and [`StreamedSource`]: another source, with its tensors in another dtype,
//! to be multiplied in another precision, or to be read again and again.

use crate::{ProductPrecision, QuantizedMatrix, RawTensor, Result, TensorInfo, TensorSource, Weight};
use candle_core::{DType, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// A source with its tensors converted to a dtype as they are read. Quantised matrices keep their format where they are
/// read as such.
#[derive(Debug, Clone)]
pub struct ConvertedSource<S> {
    source: S,
    /// `None` keeps every dtype.
    dtype: Option<DType>,
}

impl<S: TensorSource> ConvertedSource<S> {
    /// `source` in `dtype`.
    pub fn new(source: S, dtype: Option<DType>) -> Self {
        Self { source, dtype }
    }

    fn describe(&self, info: TensorInfo) -> TensorInfo {
        match self.dtype {
            Some(dtype) => TensorInfo { dtype: dtype.into(), ..info },
            None => info,
        }
    }
}

impl<S: TensorSource> TensorSource for ConvertedSource<S> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.source.tensors().into_iter().map(|info| self.describe(info)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.source.info(name).map(|info| self.describe(info))
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        match self.dtype {
            Some(_) => RawTensor::of(&self.tensor(name)?),
            None => self.source.read(name),
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let tensor = self.source.tensor(name)?;
        match self.dtype {
            Some(dtype) => Ok(tensor.to_dtype(dtype)?),
            None => Ok(tensor),
        }
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> Result<Option<QuantizedMatrix>> {
        self.source.quantized_rows(name, rows)
    }
}

/// A source for models that multiply f32 activations in a precision.
#[derive(Debug, Clone)]
pub struct SourceWithProducts<S> {
    /// Where the tensors come from.
    pub source: S,
    /// The precision.
    pub products: ProductPrecision,
}

impl<S: TensorSource> TensorSource for SourceWithProducts<S> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.source.tensors()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.source.info(name)
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        self.source.read(name)
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        self.source.read_range(name, range)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.source.tensor(name)
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> Result<Option<QuantizedMatrix>> {
        self.source.quantized_rows(name, rows)
    }

    fn streamed(&self) -> Option<Arc<dyn TensorSource>> {
        self.source.streamed()
    }

    fn products(&self) -> ProductPrecision {
        self.products
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        self.source.weight(name)
    }
}

/// A source that models read their blocks from while they run, instead of keeping them in memory.
#[derive(Clone)]
pub struct StreamedSource(pub Arc<dyn TensorSource>);

impl TensorSource for StreamedSource {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.tensors()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.info(name)
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        self.0.read(name)
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        self.0.read_range(name, range)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.0.tensor(name)
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> Result<Option<QuantizedMatrix>> {
        self.0.quantized_rows(name, rows)
    }

    fn streamed(&self) -> Option<Arc<dyn TensorSource>> {
        Some(self.0.clone())
    }

    fn products(&self) -> ProductPrecision {
        self.0.products()
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        self.0.weight(name)
    }
}
