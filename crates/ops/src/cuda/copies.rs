//! [`concatenate`] and [`slice`] on a GPU: copies of rows by the driver, which count bytes in 64 bits.

use super::address_of;
use crate::gpu_limit::check_gpu_dims;
use crate::row_copy::RowCopy;
use candle_core::backend::{BackendDevice as _, BackendStorage};
use candle_core::cuda_backend::WrapErr as _;
use candle_core::cuda_backend::cudarc::driver::sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE;
use candle_core::cuda_backend::cudarc::driver::sys::{CUDA_MEMCPY2D, cuMemcpy2DAsync_v2};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, result};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result};
use candle_core::{Shape, Tensor, bail};
use std::ptr;
use std::sync::Arc;

/// [`crate::concatenate`], or none for tensors that candle joins: on a CPU, of other dtypes, or of shapes that it refuses.
pub(crate) fn concatenate(tensors: &[&Tensor], dim: usize) -> Result<Option<Tensor>> {
    let Some((first, rest)) = tensors.split_first() else { return Ok(None) };
    let fits = |x: &&Tensor| {
        let sizes = x.dims().iter().zip(first.dims()).enumerate();
        let agree = sizes.filter(|(index, _)| *index != dim).all(|(_, (a, b))| a == b);
        is_copied(x) && x.dtype() == first.dtype() && x.rank() == first.rank() && agree && dim < x.rank()
    };
    if rest.is_empty() || !tensors.iter().all(fits) {
        return Ok(None);
    }
    check_gpu_dims(&joined_dims(&tensors.iter().map(|x| x.dims()).collect::<Vec<_>>(), dim))?;
    let contiguous = tensors.iter().map(|x| x.contiguous()).collect::<Result<Vec<Tensor>>>()?;
    let joined = match &contiguous[..] {
        [a, b] => a.apply_op2(b, Concatenation { dim })?,
        [a, b, c] => a.apply_op3(b, c, Concatenation { dim })?,
        [a, b, c, rest @ ..] => {
            let first = a.apply_op3(b, c, Concatenation { dim })?;
            let all: Vec<&Tensor> = std::iter::once(&first).chain(rest).collect();
            return concatenate(&all, dim);
        }
        _ => return Ok(None),
    };
    Ok(Some(joined))
}

/// `part`, the elements of dimension `dim` of `x` from `start` on, as a contiguous tensor; none where it is one already, or
/// where candle has to copy it.
pub(crate) fn slice(x: &Tensor, part: &Tensor, dim: usize, start: usize) -> Result<Option<Tensor>> {
    if !is_copied(x) || part.is_contiguous() || !x.is_contiguous() || part.elem_count() == 0 {
        return Ok(None);
    }
    x.apply_op1(Slice { dim, start, length: part.dim(dim)? }).map(Some)
}

fn is_copied(x: &Tensor) -> bool {
    let has_kernel_dtype = matches!(x.dtype(), DType::BF16 | DType::F16 | DType::F32 | DType::U32);
    x.device().is_cuda() && has_kernel_dtype && x.elem_count() > 0
}

/// The shape of tensors of `shapes` next to each other along dimension `dim`.
fn joined_dims(shapes: &[&[usize]], dim: usize) -> Vec<usize> {
    let mut joined = shapes[0].to_vec();
    joined[dim] = shapes.iter().map(|shape| shape[dim]).sum();
    joined
}

struct Concatenation {
    dim: usize,
}

impl Concatenation {
    fn join<const N: usize>(&self, parts: [(&CudaStorage, &Layout); N]) -> Result<(CudaStorage, Shape)> {
        let device = parts[0].0.device().clone();
        let dtype = parts[0].0.dtype();
        let shapes = parts.map(|(_, layout)| layout.dims());
        let joined = Shape::from(joined_dims(&shapes, self.dim));
        // SAFETY: the copies below write every element.
        let out = unsafe { device.alloc_uninit(&joined, dtype) }?;
        let to = address_of(&out, &Layout::contiguous(&joined))?;
        let copies = RowCopy::joining(&shapes, self.dim, dtype.size_in_bytes());
        for ((storage, layout), copy) in parts.iter().zip(copies) {
            // SAFETY: both tensors are on this device, have the sizes of the copy, and are freed on its stream.
            unsafe { start(&device, address_of(storage, layout)?, to, copy) }?;
        }
        Ok((out, joined))
    }

    /// The gradient of each of the parts that is tracked.
    fn cut<const N: usize>(&self, parts: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        let grad = grad.contiguous()?;
        let mut start = 0;
        let mut gradients = [const { None }; N];
        for (part, gradient) in parts.into_iter().zip(&mut gradients) {
            let length = part.dim(self.dim)?;
            if part.track_op() {
                let cut = grad.narrow(self.dim, start, length)?;
                *gradient = Some(slice(&grad, &cut, self.dim, start)?.unwrap_or(cut));
            }
            start += length;
        }
        Ok(gradients)
    }
}

impl CustomOp2 for Concatenation {
    fn name(&self) -> &'static str {
        "concatenate"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("concatenate: expected tensors on a GPU, found them on the CPU")
    }

    fn cuda_fwd(&self, a: &CudaStorage, la: &Layout, b: &CudaStorage, lb: &Layout) -> Result<(CudaStorage, Shape)> {
        self.join([(a, la), (b, lb)])
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.cut([a, b], grad).map(Into::into)
    }
}

impl CustomOp3 for Concatenation {
    fn name(&self) -> &'static str {
        "concatenate"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("concatenate: expected tensors on a GPU, found them on the CPU")
    }

    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
        c: &CudaStorage,
        lc: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.join([(a, la), (b, lb), (c, lc)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.cut([a, b, c], grad).map(Into::into)
    }
}

struct Slice {
    dim: usize,
    start: usize,
    length: usize,
}

impl CustomOp1 for Slice {
    fn name(&self) -> &'static str {
        "slice"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("slice: expected a tensor on a GPU, found one on the CPU")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let device = x.device().clone();
        let mut dims = layout.dims().to_vec();
        dims[self.dim] = self.length;
        let shape = Shape::from(dims);
        // SAFETY: the copy below writes every element.
        let out = unsafe { device.alloc_uninit(&shape, x.dtype()) }?;
        let copy = RowCopy::cutting(layout.dims(), self.dim, [self.start, self.length], x.dtype().size_in_bytes());
        let to = address_of(&out, &Layout::contiguous(&shape))?;
        // SAFETY: both tensors are on this device, have the sizes of the copy, and are freed on its stream.
        unsafe { start(&device, address_of(x, layout)?, to, copy) }?;
        Ok((out, shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let after = x.dim(self.dim)? - self.start - self.length;
        grad.contiguous()?.pad_with_zeros(self.dim, self.start, after).map(Some)
    }
}

/// Starts a copy on the device's stream.
///
/// # Safety
/// The addresses are those of memory on this device that the copy does not leave, freed on its stream.
unsafe fn start(device: &CudaDevice, from: u64, to: u64, copy: RowCopy) -> Result<()> {
    let stream = device.cuda_stream();
    for copy in copy.accepted() {
        // SAFETY: the caller's promise; accepted copies read and write the same bytes.
        unsafe { start_accepted(&stream, from, to, copy) }?;
    }
    Ok(())
}

/// # Safety
/// As [`start`].
unsafe fn start_accepted(stream: &Arc<CudaStream>, from: u64, to: u64, copy: RowCopy) -> Result<()> {
    let [source, target] = [from + copy.from as u64, to + copy.to as u64];
    if copy.rows == 1 {
        // SAFETY: the caller's promise.
        return unsafe { result::memcpy_dtod_async(target, source, copy.width, stream.cu_stream()) }.w();
    }
    let rows = CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: CU_MEMORYTYPE_DEVICE,
        srcHost: ptr::null(),
        srcDevice: source,
        srcArray: ptr::null_mut(),
        srcPitch: copy.from_pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: CU_MEMORYTYPE_DEVICE,
        dstHost: ptr::null_mut(),
        dstDevice: target,
        dstArray: ptr::null_mut(),
        dstPitch: copy.to_pitch,
        WidthInBytes: copy.width,
        Height: copy.rows,
    };
    // SAFETY: the caller's promise; the struct lives until the call returns.
    unsafe { cuMemcpy2DAsync_v2(&raw const rows, stream.cu_stream()) }.result().w()
}
