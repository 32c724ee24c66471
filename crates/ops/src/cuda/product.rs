//! [`transposed_product`]: operands of 16 bits, a product in f32. Candle's product has one dtype, so it would widen
//! both operands first and multiply them at a tenth of the speed.

use super::address;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_strided_batched_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
use candle_core::cuda_backend::cudarc::cublas::sys::cudaDataType_t::{self, CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F};
use candle_core::cuda_backend::{CudaStorage, WrapErr as _};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Result, Storage, Tensor};
use std::ffi::c_void;

/// aᵀ b in f32; none where the operands do not have the same dtype of 16 bits, or are not contiguous and on a GPU.
///
/// # Shapes
/// a (rows, m), b (rows, n) -> (m, n).
///
/// # Errors
/// Tensors of other ranks, or errors of cuBLAS.
pub(crate) fn transposed_product(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let Some(operands) = operand_type(a, b) else { return Ok(None) };
    let (rows, m) = a.dims2()?;
    let (b_rows, n) = b.dims2()?;
    if !is_on_gpu(a) || !is_on_gpu(b) || rows != b_rows || rows * m * n == 0 {
        return Ok(None);
    }
    let (Ok(rows), Ok(columns), Ok(lanes)) = (i32::try_from(rows), i32::try_from(m), i32::try_from(n)) else {
        return Ok(None);
    };
    let device = a.device().as_cuda_device()?;
    // SAFETY: the product below writes every element.
    let out = unsafe { device.alloc::<f32>(m * n) }?;
    let out = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device.clone()));
    let out = Tensor::from_storage(out, (m, n), BackpropOp::none(), false);
    let product = TransposedProduct { rows, columns, lanes, operands };
    // SAFETY: the three tensors are on this device, have the sizes of the product, and are freed on its stream.
    unsafe { product.run(device, [address(a)?, address(b)?], address(&out)?) }?;
    Ok(Some(out))
}

fn operand_type(a: &Tensor, b: &Tensor) -> Option<cudaDataType_t> {
    match (a.dtype(), b.dtype()) {
        (DType::BF16, DType::BF16) => Some(CUDA_R_16BF),
        (DType::F16, DType::F16) => Some(CUDA_R_16F),
        _ => None,
    }
}

fn is_on_gpu(x: &Tensor) -> bool {
    x.is_contiguous() && x.device().is_cuda()
}

/// aᵀ b of a (rows, columns) and b (rows, lanes).
struct TransposedProduct {
    rows: i32,
    columns: i32,
    lanes: i32,
    operands: cudaDataType_t,
}

impl TransposedProduct {
    /// cuBLAS is column-major, where these are b (lanes, rows), a (columns, rows) and the result b aᵀ (lanes, columns).
    ///
    /// # Safety
    /// The addresses are those of tensors on `device` with the sizes of the product, freed on its stream.
    unsafe fn run(&self, device: &CudaDevice, [a, b]: [u64; 2], out: u64) -> Result<()> {
        let Self { rows, columns, lanes, operands } = *self;
        let alpha = 1f32;
        let beta = 0f32;
        // SAFETY: the caller's promise; alpha and beta are f32, as the compute type asks for.
        unsafe {
            gemm_strided_batched_ex(
                *device.cublas_handle().handle(),
                CUBLAS_OP_N,
                CUBLAS_OP_T,
                lanes,
                columns,
                rows,
                (&raw const alpha).cast::<c_void>(),
                b as *const c_void,
                operands,
                lanes,
                0,
                a as *const c_void,
                operands,
                columns,
                0,
                (&raw const beta).cast::<c_void>(),
                out as *mut c_void,
                CUDA_R_32F,
                lanes,
                0,
                1,
                CUBLAS_COMPUTE_32F,
                CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .w()?;
        Ok(())
    }
}
