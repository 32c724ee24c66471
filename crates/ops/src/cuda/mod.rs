//! [`start`]: kernels on a GPU, on the tensor library's own stream; `rows` has those of our operations. Nothing here has
//! run on a GPU yet.

mod product;
mod rows;

pub(crate) use product::transposed_product;
pub use rows::permute;
pub(crate) use rows::{add_bias, gated_add, gelu, modulated_layer_norm, rms_norm_rope};

use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
use candle_core::cuda_backend::cudarc::driver::{CudaView, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, WrapErr as _};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Storage, Tensor, bail};
use clearform_kernels::{Launch, Number, Parameters, launch};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The GPU of this number, always the same one: all that runs on it shares a stream of its own, since the default stream
/// is another for each thread. Memory that tensors give back stays with the program, where it would be taken anew at
/// every read of a result.
///
/// # Errors
/// There is no such GPU, or no driver.
pub fn device(number: usize) -> Result<Device> {
    static OPEN: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = open.get(&number) {
        return Ok(device.clone());
    }
    let device = CudaDevice::new_with_stream(number)?;
    // SAFETY: events order what several streams do with a tensor; here all of it is done on one.
    unsafe { device.disable_event_tracking() };
    let context = device.cuda_stream().context().clone();
    if context.has_async_alloc() {
        let all = u64::MAX;
        // SAFETY: the pool is the device's own, and the attribute a number of 64 bits.
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
    open.insert(number, Device::Cuda(device.clone()));
    Ok(Device::Cuda(device))
}

/// Starts `launch`; it ends when the device's stream gets there. The driver compiles the kernel's PTX at its first use.
///
/// # Errors
/// The driver refused.
///
/// # Safety
/// As [`clearform_kernels::launch::start`].
pub unsafe fn start<P: Parameters>(device: &CudaDevice, launch: &Launch, parameters: P) -> Result<()> {
    let function = device.get_or_load_custom_func(&launch.entry, launch.kernel.name, launch.kernel.ptx)?;
    // SAFETY: the caller's promise; the function was loaded from the launch's own kernel.
    unsafe { launch::start(&device.cuda_stream(), &function, launch, parameters) }.w()
}

/// The numbers of a contiguous tensor.
///
/// # Errors
/// It is not contiguous, or of another type.
pub fn contiguous<'a, T: CudaDType + DeviceRepr>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("a kernel was given a tensor that is not contiguous: {layout:?}"),
    }
}

/// What the kernels call the number format, if they take it.
pub fn number(dtype: DType) -> Option<Number> {
    match dtype {
        DType::BF16 => Some(Number::Bf16),
        DType::F16 => Some(Number::F16),
        DType::F32 => Some(Number::F32),
        _ => None,
    }
}

/// Where a contiguous tensor lies. It stays there while the tensor lives.
///
/// # Errors
/// It is not contiguous, not on a GPU, or of a type that no kernel takes.
pub fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("a kernel of a GPU was given a tensor of {:?}", tensor.device())
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
        dtype => bail!("no kernel takes {dtype:?}"),
    })
}
