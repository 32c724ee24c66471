//! Conversions between candle tensors and DLPack tensors, for the host and for plugins that compute with candle.

use crate::tensor::{BorrowedTensor, ElementType, OwnedTensor};
use candle_core::{DType, Device, Error, Result, Tensor};
use safetensors::View as _;
use std::str::FromStr as _;

impl ElementType {
    /// The candle dtype.
    ///
    /// # Errors
    /// candle has no such dtype.
    pub fn to_candle(self) -> Result<DType> {
        DType::from_str(self.name()).map_err(Error::wrap)
    }
}

impl BorrowedTensor<'_> {
    /// Copies the tensor into a candle tensor on the CPU.
    ///
    /// # Errors
    /// candle has no such dtype, or cannot build the tensor.
    pub fn to_candle(&self) -> Result<Tensor> {
        Tensor::from_raw_buffer(self.bytes(), self.element().to_candle()?, &self.shape(), &Device::Cpu)
    }
}

impl OwnedTensor {
    /// Copies `tensor`, which may be on any device.
    ///
    /// # Errors
    /// The dtype is not supported by the plugin interface, or candle cannot copy the tensor.
    pub fn from_candle(tensor: &Tensor) -> Result<Self> {
        let dtype = tensor.dtype();
        let unsupported = || Error::Msg(format!("dtype {dtype:?} is not supported by the plugin interface"));
        let element = ElementType::from_name(dtype.as_str()).ok_or_else(unsupported)?;
        let bytes = tensor.to_device(&Device::Cpu)?.contiguous()?.data().into_owned();
        Ok(Self::new(bytes, element, tensor.dims()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candle_tensors_survive_a_round_trip() -> Result<()> {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I64, DType::U32, DType::U8] {
            let tensor = Tensor::arange(0f32, 6.0, &Device::Cpu)?.reshape((2, 3))?.to_dtype(dtype)?.t()?;
            let copy = OwnedTensor::from_candle(&tensor)?.view().to_candle()?;
            assert_eq!((copy.dims(), copy.dtype()), ([3, 2].as_slice(), dtype));
            let values = copy.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(values, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0], "{dtype:?}");
        }
        Ok(())
    }
}
