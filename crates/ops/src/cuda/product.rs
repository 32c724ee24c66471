//! [`transposed_product`]: factors of 16 bits, a product in f32. The tensor library's product has one number format, so
//! it would widen both factors first and multiply them at a tenth of the speed.

use super::address;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_strided_batched_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
use candle_core::cuda_backend::cudarc::cublas::sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F};
use candle_core::cuda_backend::{CudaStorage, WrapErr as _};
use candle_core::op::BackpropOp;
use candle_core::{DType, Result, Storage, Tensor};
use std::ffi::c_void;

/// aᵀ b in f32; none where the factors are not both of the same 16 bits, contiguous and on a GPU.
///
/// # Shapes
/// a (rows, m), b (rows, n) -> (m, n).
///
/// # Errors
/// Other shapes, or cuBLAS refused.
pub(crate) fn transposed_product(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let format = match (a.dtype(), b.dtype()) {
        (DType::BF16, DType::BF16) => CUDA_R_16BF,
        (DType::F16, DType::F16) => CUDA_R_16F,
        _ => return Ok(None),
    };
    let ((rows, m), (others, n)) = (a.dims2()?, b.dims2()?);
    let placed = a.is_contiguous() && b.is_contiguous() && a.device().is_cuda() && rows == others;
    let (Ok(k), Ok(m_extent), Ok(n_extent)) = (i32::try_from(rows), i32::try_from(m), i32::try_from(n)) else {
        return Ok(None);
    };
    if !placed || rows * m * n == 0 {
        return Ok(None);
    }
    let device = a.device().as_cuda_device()?;
    // SAFETY: the product below writes every number of it.
    let out = unsafe { device.alloc::<f32>(m * n) }?;
    let out = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device.clone()));
    let out = Tensor::from_storage(out, (m, n), BackpropOp::none(), false);
    let (one, zero) = (1f32, 0f32);
    let scalar = |number: &f32| std::ptr::from_ref(number).cast::<c_void>();
    let (left, right, product) = (address(b)?, address(a)?, address(&out)?);
    // SAFETY: cuBLAS counts by columns, where these are b (n, rows), a (m, rows) and the result b aᵀ (n, m); all three
    // lie on this device, as large as that, and are freed on its stream.
    unsafe {
        gemm_strided_batched_ex(
            *device.cublas_handle().handle(),
            CUBLAS_OP_N,
            CUBLAS_OP_T,
            n_extent,
            m_extent,
            k,
            scalar(&one),
            left as *const c_void,
            format,
            n_extent,
            0,
            right as *const c_void,
            format,
            m_extent,
            0,
            scalar(&zero),
            product as *mut c_void,
            CUDA_R_32F,
            n_extent,
            0,
            1,
            CUBLAS_COMPUTE_32F,
            CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()?;
    Ok(Some(out))
}
