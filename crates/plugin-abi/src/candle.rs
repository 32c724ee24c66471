//! Tensors of candle across the boundary, both ways; for the host, and for plugins that compute with candle.

use crate::tensor::{BorrowedTensor, ElementType, OwnedTensor, give};
use candle_core::{DType, Device, Error, Result, Tensor};
use safetensors::View as _;
use std::str::FromStr as _;

impl ElementType {
    /// candle's name for it.
    ///
    /// # Errors
    /// candle has none.
    pub fn to_candle(self) -> Result<DType> {
        DType::from_str(self.name()).map_err(Error::wrap)
    }
}

impl BorrowedTensor<'_> {
    /// A copy of it, on the CPU.
    ///
    /// # Errors
    /// candle refused.
    pub fn to_candle(&self) -> Result<Tensor> {
        Tensor::from_raw_buffer(self.bytes(), self.element().to_candle()?, &self.shape(), &Device::Cpu)
    }
}

impl OwnedTensor {
    /// A copy of `tensor`, which may lie on any device, to lend or to give away.
    ///
    /// # Errors
    /// A number format that cannot cross, or candle refused.
    pub fn of_candle(tensor: &Tensor) -> Result<Self> {
        let element = ElementType::named(tensor.dtype().as_str());
        let element = element.ok_or_else(|| Error::Msg(format!("{:?} cannot cross to a plugin", tensor.dtype())))?;
        let bytes = tensor.to_device(&Device::Cpu)?.contiguous()?.data().into_owned();
        // SAFETY: it is made just now, and nobody else has it.
        unsafe { Self::take(give(bytes, element, tensor.dims())) }.map_err(Error::Msg)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_as_they_went() -> Result<()> {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I64, DType::U32, DType::U8] {
            let tensor = Tensor::arange(0f32, 6.0, &Device::Cpu)?.reshape((2, 3))?.to_dtype(dtype)?.t()?;
            let back = OwnedTensor::of_candle(&tensor)?.view().to_candle()?;
            let values = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.contiguous()?.flatten_all()?.to_vec1::<f32>();
            assert_eq!((back.dims(), back.dtype(), values(&back)?), (tensor.dims(), dtype, values(&tensor)?));
        }
        Ok(())
    }
}
