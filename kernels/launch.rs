//! [`start`]: launches on a device, through cudarc and on the caller's stream; [`DeviceLists`] and [`DevicePairs`]:
//! lists in its memory. The only file that knows the driver.

use crate::clear_attention::{
    KernelProblem, ListEntry, TensorMap, TileVisit, VisitLists, WorkItem, WorkPair, WorkPairs,
};
use crate::{KernelParameters, Launch, Scalar};
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::sys::{
    CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle,
    cuTensorMapEncodeTiled,
};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg};
use std::sync::Arc;

/// Starts `launch`, whose entry point is `function`, on `stream`, asynchronously.
///
/// # Errors
/// Errors of the driver.
///
/// # Safety
/// `function` is the entry point of the launch, loaded from its kernel's PTX, and `parameters` are its parameters.
/// Their addresses are memory of this device, as large as the kernel's source states, that lives until the launch has
/// ended and that nothing else uses meanwhile.
pub unsafe fn start<P: KernelParameters>(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    launch: &Launch,
    parameters: P,
) -> Result<(), DriverError> {
    if launch.blocks.contains(&0) {
        return Ok(());
    }
    function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared_bytes as i32)?;
    let parameters = Argument(parameters);
    let mut builder = stream.launch_builder(function);
    builder.arg(&parameters);
    let [x, y, z] = launch.blocks;
    let config =
        LaunchConfig { grid_dim: (x, y, z), block_dim: (launch.threads, 1, 1), shared_mem_bytes: launch.shared_bytes };
    // SAFETY: the caller's promise; `KernelParameters` has the layout of the one argument there is.
    unsafe { builder.launch(config) }.map(drop)
}

/// [`VisitLists`] in device memory.
pub struct DeviceLists {
    /// [`VisitLists::work`].
    pub work: CudaSlice<WorkItem>,
    /// [`VisitLists::joins`]; a single one without rows if there are none.
    pub joins: CudaSlice<WorkItem>,
    /// [`VisitLists::entries`].
    pub entries: CudaSlice<ListEntry>,
    /// [`VisitLists::masks`]; a single word if there are none.
    pub masks: CudaSlice<u32>,
}

impl DeviceLists {
    /// Copies `lists` to the device.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn new(stream: &Arc<CudaStream>, lists: &VisitLists) -> Result<Self, DriverError> {
        // The driver cannot allocate 0 bytes.
        let none = [WorkItem { first: 0, count: 0, begin: 0, end: 0, slot: -1 }];
        let joins = if lists.joins.is_empty() { &none[..] } else { &lists.joins };
        let masks = if lists.masks.is_empty() { &[0][..] } else { &lists.masks };
        Ok(Self {
            work: stream.clone_htod(&lists.work)?,
            joins: stream.clone_htod(joins)?,
            entries: stream.clone_htod(&lists.entries)?,
            masks: stream.clone_htod(masks)?,
        })
    }
}

/// [`WorkPairs`] in device memory.
pub struct DevicePairs {
    /// [`WorkPairs::pairs`].
    pub pairs: CudaSlice<WorkPair>,
    /// [`WorkPairs::visits`].
    pub visits: CudaSlice<TileVisit>,
}

impl DevicePairs {
    /// Copies `pairs` to the device.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn new(stream: &Arc<CudaStream>, pairs: &WorkPairs) -> Result<Self, DriverError> {
        Ok(Self { pairs: stream.clone_htod(&pairs.pairs)?, visits: stream.clone_htod(&pairs.visits)? })
    }
}

/// The tensor map of keys or values of `problem`, (batch, `tokens`, heads, head_dim), in boxes of 64 tokens and 64
/// channels of one head. Rows of 128 bytes are swizzled; tokens past the end are read as zeros.
///
/// # Errors
/// Errors of the driver.
pub fn tile_map(problem: &KernelProblem, address: u64, tokens: usize) -> Result<TensorMap, DriverError> {
    let dtype = match problem.scalar() {
        Scalar::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let dims = problem.dims(tokens).map(|size| size as u64);
    let row = dims[0] * 2;
    let strides = [row, row * dims[1], row * dims[1] * dims[2]];
    let mut map = TensorMap([0; 16]);
    // SAFETY: the map has 128 bytes and is aligned to 64; the arrays have as many elements as the rank requires.
    let status = unsafe {
        cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            dtype,
            dims.len() as u32,
            address as *mut _,
            dims.as_ptr(),
            strides.as_ptr(),
            [64, 1, 64, 1].as_ptr(),
            [1; 4].as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    status.result().map(|()| map)
}

struct Argument<P>(P);

// SAFETY: `KernelParameters` promises the layout of the kernel's argument.
unsafe impl<P: KernelParameters> DeviceRepr for Argument<P> {}
// SAFETY: repr(C), five ints as in common.cuh.
unsafe impl DeviceRepr for WorkItem {}
// SAFETY: repr(C), three ints as in common.cuh.
unsafe impl DeviceRepr for ListEntry {}
// SAFETY: repr(C), six ints as in pairs.cuh.
unsafe impl DeviceRepr for WorkPair {}
// SAFETY: repr(C), three ints as in pairs.cuh.
unsafe impl DeviceRepr for TileVisit {}
