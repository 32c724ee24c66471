//! [`start`]: launches kernels on a GPU, on candle's stream. `rows` has the row-wise operations, `product` a matrix
//! product, `copies` joins and cuts tensors. None of it has run on a real GPU yet.

mod copies;
mod product;
mod rows;

pub(crate) use copies::{concatenate, slice};
pub(crate) use product::transposed_product;
pub use rows::permute;
pub(crate) use rows::{add_bias, gated_add, gelu, modulated_layer_norm, rms_norm_rope};

use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaModule, CudaView, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, WrapErr as _};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Storage, Tensor, bail};
use clearform_kernels::{Kernel, KernelParameters, Launch, Scalar, launch};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The GPU of this ordinal. Every call returns the same device, so that everything on it shares one stream; the default
/// stream is a different one for each thread. Freed memory stays in the pool of the process, because otherwise the
/// driver would return it at every synchronization and allocate it again.
///
/// # Errors
/// No such GPU, or no driver.
pub fn device(ordinal: usize) -> Result<Device> {
    static OPEN: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = open.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: events order the uses of a tensor by several streams; here there is only one.
    unsafe { device.disable_event_tracking() };
    let context = device.cuda_stream().context().clone();
    if context.has_async_alloc() {
        let all = u64::MAX;
        // SAFETY: the pool belongs to the device, and the attribute is a 64-bit integer.
        unsafe {
            let pool = result::device::get_default_mem_pool(context.cu_device()).w()?;
            result::mem_pool::set_attribute(
                pool,
                CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw const all).cast_mut().cast(),
            )
            .w()?;
        }
    }
    open.insert(ordinal, Device::Cuda(device.clone()));
    Ok(Device::Cuda(device))
}

/// Starts `launch` on the device's stream, asynchronously. The kernel is loaded at its first use.
///
/// # Errors
/// Errors of the driver.
///
/// # Safety
/// As [`clearform_kernels::launch::start`].
pub unsafe fn start<P: KernelParameters>(device: &CudaDevice, launch: &Launch, parameters: P) -> Result<()> {
    let stream = device.cuda_stream();
    let function = module(stream.context(), &launch.kernel)?.load_function(&launch.entry).w()?;
    // SAFETY: the caller's promise; the function was loaded from the launch's own kernel.
    unsafe { launch::start(&stream, &function, launch, parameters) }.w()
}

/// The module of `kernel` on a GPU, loaded once: its machine code if the GPU takes it, else its PTX, which the driver
/// compiles. With `CLEARFORM_PTX` in the environment it is always the PTX.
fn module(context: &Arc<CudaContext>, kernel: &Kernel) -> Result<Arc<CudaModule>> {
    static LOADED: Mutex<BTreeMap<(usize, &str), Arc<CudaModule>>> = Mutex::new(BTreeMap::new());
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (context.ordinal(), kernel.name);
    if let Some(module) = loaded.get(&key) {
        return Ok(module.clone());
    }
    let cubin = kernel.cubin.filter(|_| std::env::var_os("CLEARFORM_PTX").is_none());
    let from_cubin = cubin.and_then(|cubin| context.load_module(Ptx::from_binary(cubin.to_vec())).ok());
    let module = match from_cubin {
        Some(module) => module,
        None => context.load_module(Ptx::from_src(kernel.ptx)).w()?,
    };
    loaded.insert(key, module.clone());
    Ok(module)
}

/// The elements of a contiguous tensor.
///
/// # Errors
/// It is not contiguous, or has another dtype.
pub fn contiguous<'a, T: CudaDType + DeviceRepr>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("expected a contiguous tensor, found {layout:?}"),
    }
}

/// The kernels' name for `dtype`, if they support it.
pub fn scalar(dtype: DType) -> Option<Scalar> {
    match dtype {
        DType::BF16 => Some(Scalar::Bf16),
        DType::F16 => Some(Scalar::F16),
        DType::F32 => Some(Scalar::F32),
        _ => None,
    }
}

/// The device address of a contiguous tensor, valid while the tensor lives.
///
/// # Errors
/// It is not contiguous, not on a GPU, or of a dtype that no kernel supports.
pub fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("expected a tensor on a GPU, found one on {:?}", tensor.device())
    };
    address_of(storage, layout)
}

fn address_of(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    Ok(match candle_core::backend::BackendStorage::dtype(storage) {
        DType::BF16 => contiguous::<bf16>(storage, layout)?.device_ptr(&stream).0,
        DType::F16 => contiguous::<f16>(storage, layout)?.device_ptr(&stream).0,
        DType::F32 => contiguous::<f32>(storage, layout)?.device_ptr(&stream).0,
        DType::U32 => contiguous::<u32>(storage, layout)?.device_ptr(&stream).0,
        dtype => bail!("no kernel supports {dtype:?}"),
    })
}
