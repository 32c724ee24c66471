//! [`TensorSource`]: the trait through which models, layouts and writers read tensors, from a file or from memory.

use crate::{ProductPrecision, QuantizedMatrix, Result, Weight, WeightsError};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::sync::Arc;

pub use safetensors::Dtype;

/// Whether models compute with weights of `dtype`, which they may convert first: the floating-point dtypes of PyTorch
/// that hold plain values. Integers, booleans and 4-bit floats are quantised forms, whose values need scales.
pub fn is_weight_dtype(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// A tensor's name, dtype and shape, without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the layout of the source.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of its elements.
    pub fn element_count(&self) -> u64 {
        self.shape.iter().map(|&dimension| dimension as u64).product()
    }

    /// Bytes of its values.
    pub fn byte_count(&self) -> u64 {
        self.element_count() * self.dtype.bitsize() as u64 / 8
    }
}

/// A tensor's values as bytes: little-endian, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor {
    /// The dtype of `bytes`.
    pub dtype: Dtype,
    /// The shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// The values.
    pub bytes: Vec<u8>,
}

impl RawTensor {
    /// Whether it has no NaN and no infinity. Formats without them have none.
    pub fn is_finite(&self) -> bool {
        // The exponent of both has all its bits set. Without an early end the loops are vectors.
        let halves = |mask: u16| {
            let values = self.bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
            !values.fold(false, |found, bits| found | (bits & mask == mask))
        };
        match self.dtype {
            Dtype::BF16 => halves(0x7f80),
            Dtype::F16 => halves(0x7c00),
            Dtype::F32 => {
                let values = self.bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
                !values.fold(false, |found, bits| found | (bits & 0x7f80_0000 == 0x7f80_0000))
            }
            _ => true,
        }
    }
}

/// Where tensors come from: a checkpoint, a renamed view of one, or memory. Threads may share a source: one can read the
/// next block of a model while another computes.
pub trait TensorSource: Send + Sync {
    /// All tensors, sorted by name.
    fn tensors(&self) -> Vec<TensorInfo>;

    /// The dtype and shape of the tensor `name`.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Reads the values of the tensor `name`.
    ///
    /// # Errors
    /// [`WeightsError::Missing`] for an unknown name, [`WeightsError::Io`] if reading fails.
    fn read(&self, name: &str) -> Result<RawTensor>;

    /// Reads the bytes `range` of the tensor `name`.
    ///
    /// # Errors
    /// As [`Self::read`]; also [`WeightsError::BadTensor`] for a range outside the tensor.
    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = self.read(name)?.bytes;
        if range.start > range.end || range.end > bytes.len() {
            let reason = format!("bytes {range:?} requested of {}", bytes.len());
            return Err(WeightsError::BadTensor { name: name.to_owned(), reason });
        }
        bytes.truncate(range.end);
        bytes.drain(..range.start);
        Ok(bytes)
    }

    /// The tensor `name` on the CPU, in the dtype of [`Self::info`]. Sources in memory share their storage.
    ///
    /// # Errors
    /// As [`Self::read`]; also [`WeightsError::BadTensor`] for a dtype that candle does not have.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.read(name)?.to_tensor(name)
    }

    /// Some rows of the matrix `name` as they are stored, if that is a quantised format; `None` of other tensors, and
    /// where values are not those of the file. Sources that present the tensors of another pass its rows on.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> Result<Option<QuantizedMatrix>> {
        let _ = (name, rows);
        Ok(None)
    }

    /// Itself, if a model shall read its blocks from it again and again while it runs, instead of keeping them
    /// ([`StreamedSource`](crate::StreamedSource)).
    fn streamed(&self) -> Option<Arc<dyn TensorSource>> {
        None
    }

    /// How f32 activations are multiplied in a model that is built from it.
    fn products(&self) -> ProductPrecision {
        ProductPrecision::Full
    }

    /// The same tensor as a [`Weight`] to multiply by: a matrix in a quantised format stays in it, and low-rank terms
    /// may be beside it instead of in it. Most sources have no terms.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    fn weight(&self, name: &str) -> Result<Weight> {
        let shape = self.info(name).map(|info| info.shape).unwrap_or_default();
        let quantized = match shape[..] {
            [rows, _] => self.quantized_rows(name, 0..rows)?,
            _ => None,
        };
        quantized.map_or_else(|| self.tensor(name).map(Weight::from), |matrix| Ok(matrix.into()))
    }
}

/// Whether `tensor` is free of NaN and infinity.
///
/// # Errors
/// A tensor operation failed.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    // A sum of squares is finite only if every value is.
    Ok(tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.is_finite())
}

/// Whether the tensor `info` of `source` is a matrix that stays quantised in memory. Its first row is read.
pub fn is_quantized(source: &dyn TensorSource, info: &TensorInfo) -> bool {
    quantized_row(source, info).is_some()
}

/// Bytes that the tensor `info` of `source` takes in memory: as it is stored if it is quantised, else in `dtype` or in its
/// own. The first row of a matrix is read.
pub fn held_bytes(source: &dyn TensorSource, info: &TensorInfo, dtype: Option<DType>) -> u64 {
    match (quantized_row(source, info), dtype) {
        (Some(row), _) => info.shape[0] as u64 * row.byte_count() as u64,
        (None, Some(dtype)) => info.element_count() * dtype.size_in_bytes() as u64,
        (None, None) => info.byte_count(),
    }
}

fn quantized_row(source: &dyn TensorSource, info: &TensorInfo) -> Option<QuantizedMatrix> {
    match info.shape[..] {
        // A tensor that cannot be read is reported where it is.
        [rows, _] if rows > 0 => source.quantized_rows(&info.name, 0..1).ok().flatten(),
        _ => None,
    }
}

/// References and shared pointers to a source are sources.
impl<P> TensorSource for P
where
    P: Deref + Send + Sync,
    P::Target: TensorSource,
{
    fn tensors(&self) -> Vec<TensorInfo> {
        (**self).tensors()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        (**self).info(name)
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        (**self).read(name)
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        (**self).read_range(name, range)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        (**self).tensor(name)
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> Result<Option<QuantizedMatrix>> {
        (**self).quantized_rows(name, rows)
    }

    fn streamed(&self) -> Option<Arc<dyn TensorSource>> {
        (**self).streamed()
    }

    fn products(&self) -> ProductPrecision {
        (**self).products()
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        (**self).weight(name)
    }
}

impl RawTensor {
    /// The values of `tensor`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        use safetensors::View;
        let bytes = tensor.contiguous()?.data().into_owned();
        Ok(Self { dtype: tensor.dtype().into(), shape: tensor.dims().to_vec(), bytes })
    }

    /// Copies the values into a tensor on the CPU; `name` is only used in the error.
    ///
    /// # Errors
    /// [`WeightsError::BadTensor`] for a dtype that candle does not have.
    pub fn to_tensor(&self, name: &str) -> Result<Tensor> {
        let dtype = DType::try_from(self.dtype).map_err(|_| WeightsError::BadTensor {
            name: name.to_owned(),
            reason: format!("dtype {:?} cannot be computed with", self.dtype),
        })?;
        Ok(Tensor::from_raw_buffer(&self.bytes, dtype, &self.shape, &Device::Cpu)?)
    }
}

/// Tensors held in memory. Clones, and models built from it, share the storages, so a teacher and a student hold their
/// frozen weights only once.
#[derive(Debug, Clone, Default)]
pub struct InMemoryTensors {
    tensors: BTreeMap<String, Tensor>,
}

impl InMemoryTensors {
    /// Reads all of `source`, one tensor at a time, to `device`, converted to `dtype` if one is given.
    ///
    /// # Errors
    /// The first tensor that cannot be read or converted.
    pub fn load(source: &dyn TensorSource, dtype: Option<DType>, device: &Device) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for info in source.tensors() {
            let stored = source.tensor(&info.name)?;
            let wanted = dtype.unwrap_or(stored.dtype());
            tensors.insert(info.name, stored.to_dtype(wanted)?.to_device(device)?);
        }
        Ok(Self { tensors })
    }

    /// Inserts `tensor`, replacing one of the same name.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// Names and tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }
}

impl FromIterator<(String, Tensor)> for InMemoryTensors {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(tensors: I) -> Self {
        Self { tensors: tensors.into_iter().collect() }
    }
}

impl TensorSource for InMemoryTensors {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.tensors.iter().map(|(name, tensor)| describe(name, tensor)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|tensor| describe(name, tensor))
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        RawTensor::of(&self.tensor(name)?)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.tensors.get(name).cloned().ok_or_else(|| WeightsError::Missing { name: name.to_owned() })
    }
}

fn describe(name: &str, tensor: &Tensor) -> TensorInfo {
    TensorInfo { name: name.to_owned(), dtype: tensor.dtype().into(), shape: tensor.dims().to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_infinity_are_found_in_every_format() {
        let raw = |dtype, bytes: Vec<u8>| RawTensor { dtype, shape: vec![2], bytes };
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let bf16 = [half::bf16::from_f32(1.0), half::bf16::from_f32(value)].map(half::bf16::to_le_bytes).concat();
            let f16 = [half::f16::from_f32(1.0), half::f16::from_f32(value)].map(half::f16::to_le_bytes).concat();
            let f32 = [1.0, value].map(f32::to_le_bytes).concat();
            assert!(
                ![raw(Dtype::BF16, bf16), raw(Dtype::F16, f16), raw(Dtype::F32, f32)].iter().any(RawTensor::is_finite)
            );
        }
        let largest = [f32::MAX, f32::MIN].map(f32::to_le_bytes).concat();
        assert!(raw(Dtype::F32, largest).is_finite() && raw(Dtype::I64, vec![0xff; 16]).is_finite());
    }
}
