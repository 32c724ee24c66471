//! [`MAX_GPU_ELEMENTS`]: candle's CUDA kernels count elements in 32 bits. Beyond, they compute or copy only a part, silently,
//! so larger tensors are avoided on a GPU (`joining.rs`), and refused where they cannot be avoided.

use candle_core::{Result, Tensor, bail};

/// The most elements of a tensor that candle's operations index on a GPU.
pub const MAX_GPU_ELEMENTS: usize = i32::MAX as usize;

/// Refuses a tensor that the operations of a GPU cannot index; any is fine on a CPU.
///
/// # Errors
/// More than [`MAX_GPU_ELEMENTS`] elements. The message says what to do.
pub fn check_gpu_size(x: &Tensor) -> Result<()> {
    if x.device().is_cpu() { Ok(()) } else { check_gpu_dims(x.dims()) }
}

/// Refuses the shape of a tensor that the operations of a GPU cannot index.
///
/// # Errors
/// As [`check_gpu_size`].
pub fn check_gpu_dims(dims: &[usize]) -> Result<()> {
    let count: usize = dims.iter().product();
    if count <= MAX_GPU_ELEMENTS {
        return Ok(());
    }
    bail!(
        "a tensor of {dims:?} has {count} elements, and a GPU indexes at most {MAX_GPU_ELEMENTS}: generate fewer images \
         at a time, or smaller ones"
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn a_tensor_too_large_for_a_gpu_is_fine_on_a_cpu() {
        let zero = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        check_gpu_size(&zero.broadcast_as((1 << 16, 1 << 16)).unwrap()).unwrap();
        check_gpu_dims(&[2, 262_656, 3072]).unwrap();
        let message = check_gpu_dims(&[4, 262_656, 3072]).unwrap_err().to_string();
        assert!(message.contains("3227516928 elements") && message.contains("fewer images at a time"), "{message}");
    }
}
