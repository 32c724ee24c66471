//! [`TensorSource`]: the seam through which models, layouts and writers pull tensors, wherever they lie.

use crate::{Result, WeightsError};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::ops::{Deref, Range};

pub use safetensors::Dtype;

/// A tensor's name, number format and shape; not its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, in whatever layout the source has.
    pub name: String,
    /// Number format as stored.
    pub dtype: Dtype,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// How many values it has.
    pub fn element_count(&self) -> u64 {
        self.shape.iter().map(|&extent| extent as u64).product()
    }

    /// Bytes of its values.
    pub fn byte_count(&self) -> u64 {
        self.element_count() * self.dtype.bitsize() as u64 / 8
    }
}

/// A tensor's values as stored: little-endian, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor {
    /// Number format of `bytes`.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The values.
    pub bytes: Vec<u8>,
}

/// Where tensors come from: a checkpoint, a renamed view of one, or memory.
pub trait TensorSource {
    /// Every tensor, sorted by name.
    fn tensors(&self) -> Vec<TensorInfo>;

    /// One tensor's description.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Reads one tensor's bytes.
    ///
    /// # Errors
    /// [`WeightsError::Missing`] for an unknown name, [`WeightsError::Io`] if reading fails.
    fn read(&self, name: &str) -> Result<RawTensor>;

    /// Reads some of one tensor's bytes, counted from its first.
    ///
    /// # Errors
    /// As [`Self::read`]; also [`WeightsError::BadTensor`] for a range that the tensor does not have.
    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = self.read(name)?.bytes;
        if range.start > range.end || range.end > bytes.len() {
            let reason = format!("bytes {range:?} asked of {}", bytes.len());
            return Err(WeightsError::BadTensor { name: name.to_owned(), reason });
        }
        bytes.truncate(range.end);
        bytes.drain(..range.start);
        Ok(bytes)
    }

    /// One tensor to compute with, on the CPU, in its stored number format. Sources in memory share their storage.
    ///
    /// # Errors
    /// As [`Self::read`]; also [`WeightsError::BadTensor`] for a number format the tensor library does not have.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.read(name)?.to_tensor(name)
    }

    /// The same tensor as a weight and low-rank terms beside it, which together are [`Self::tensor`]: for whoever
    /// multiplies by it and can add the terms' products. Most sources have no terms.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    fn low_rank_terms(&self, name: &str) -> Result<(Tensor, Vec<LowRank>)> {
        Ok((self.tensor(name)?, Vec::new()))
    }
}

/// A term of a weight, scale · up · down, that is never multiplied out.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// (rank, inputs).
    pub down: Tensor,
    /// (outputs, rank).
    pub up: Tensor,
    /// Its factor.
    pub scale: f64,
}

/// What borrows or shares a source is one too.
impl<P> TensorSource for P
where
    P: Deref,
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

    fn low_rank_terms(&self, name: &str) -> Result<(Tensor, Vec<LowRank>)> {
        (**self).low_rank_terms(name)
    }
}

impl RawTensor {
    /// Copies the values into a tensor on the CPU; `name` is for the error alone.
    ///
    /// # Errors
    /// [`WeightsError::BadTensor`] for a number format the tensor library does not have.
    pub fn to_tensor(&self, name: &str) -> Result<Tensor> {
        let dtype = DType::try_from(self.dtype).map_err(|_| WeightsError::BadTensor {
            name: name.to_owned(),
            reason: format!("number format {:?} cannot be computed with", self.dtype),
        })?;
        Ok(Tensor::from_raw_buffer(&self.bytes, dtype, &self.shape, &Device::Cpu)?)
    }
}

/// Tensors held in memory. Cloning it, or building two models from it, shares every storage: this is how teacher and
/// student hold their frozen weights once.
#[derive(Debug, Clone, Default)]
pub struct InMemoryTensors {
    tensors: BTreeMap<String, Tensor>,
}

impl InMemoryTensors {
    /// Reads all of `source`, one tensor at a time, to `device`; `dtype` of `None` keeps the stored number formats.
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

    /// Puts `tensor` in, replacing one of the same name.
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
        use safetensors::View;
        let tensor = self.tensor(name)?;
        let TensorInfo { dtype, shape, .. } = describe(name, &tensor);
        let bytes = tensor.contiguous()?.data().into_owned();
        Ok(RawTensor { dtype, shape, bytes })
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.tensors.get(name).cloned().ok_or_else(|| WeightsError::Missing { name: name.to_owned() })
    }
}

fn describe(name: &str, tensor: &Tensor) -> TensorInfo {
    TensorInfo { name: name.to_owned(), dtype: tensor.dtype().into(), shape: tensor.dims().to_vec() }
}
