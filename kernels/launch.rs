//! [`start`]: a launch on a device, through cudarc and on a stream that someone else owns; [`DeviceLists`] and
//! [`DevicePairs`] are lists in its memory. The only file that knows a driver; it knows no tensor.

use crate::clear_attention::{Entry, Lists, Pair, Pairs, Problem, TensorMap, Visit, Work};
use crate::{Launch, Number, Parameters};
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::sys::{
    CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle,
    cuTensorMapEncodeTiled,
};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg};
use std::sync::Arc;

/// Starts `launch`, whose entry point is `function`; it ends when the stream gets there.
///
/// # Errors
/// The driver refused.
///
/// # Safety
/// `function` is the launch's entry point, loaded from its kernel's PTX, and `parameters` are those of that entry point.
/// Their addresses name memory of this device, as large as the kernel's source says, which lives until the stream has
/// passed the launch and which nothing else uses meanwhile.
pub unsafe fn start<P: Parameters>(
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

/// Lists in memory of a device.
pub struct ResidentLists {
    /// [`VisitLists::work`].
    pub work: CudaSlice<Work>,
    /// [`VisitLists::joins`]; one that names no row where there are none.
    pub joins: CudaSlice<Work>,
    /// [`VisitLists::entries`].
    pub entries: CudaSlice<Entry>,
    /// [`VisitLists::masks`]; one word where there are none.
    pub masks: CudaSlice<u32>,
}

impl ResidentLists {
    /// Copies `lists`.
    ///
    /// # Errors
    /// The driver refused.
    pub fn new(stream: &Arc<CudaStream>, lists: &Lists) -> Result<Self, DriverError> {
        // The driver allocates no empty memory.
        let none = [Work { first: 0, count: 0, begin: 0, end: 0, slot: -1 }];
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

/// Pairs in memory of a device.
pub struct ResidentPairs {
    /// [`WorkPairs::pairs`].
    pub pairs: CudaSlice<Pair>,
    /// [`WorkPairs::visits`].
    pub visits: CudaSlice<Visit>,
}

impl ResidentPairs {
    /// Copies `pairs`.
    ///
    /// # Errors
    /// The driver refused.
    pub fn new(stream: &Arc<CudaStream>, pairs: &Pairs) -> Result<Self, DriverError> {
        Ok(Self { pairs: stream.clone_htod(&pairs.pairs)?, visits: stream.clone_htod(&pairs.visits)? })
    }
}

/// How the device finds tiles in keys or values of `problem`, (batch, `tokens`, heads, head_dim): boxes of 64 tokens and 64
/// numbers of one head, whose rows of 128 bytes have their chunks swizzled. What lies behind the last token is zeros.
///
/// # Errors
/// The driver refused.
pub fn tile_map(problem: &Problem, address: u64, tokens: usize) -> Result<TensorMap, DriverError> {
    let format = match problem.number() {
        Number::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let extents = problem.extents(tokens).map(|extent| extent as u64);
    let row = extents[0] * 2;
    let strides = [row, row * extents[1], row * extents[1] * extents[2]];
    let mut map = TensorMap([0; 16]);
    // SAFETY: the map has 128 bytes and begins at a multiple of 64; the lists have as many numbers as the rank asks for.
    let status = unsafe {
        cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            format,
            extents.len() as u32,
            address as *mut _,
            extents.as_ptr(),
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
unsafe impl<P: Parameters> DeviceRepr for Argument<P> {}
// SAFETY: repr(C), five ints as in common.cuh.
unsafe impl DeviceRepr for Work {}
// SAFETY: repr(C), three ints as in common.cuh.
unsafe impl DeviceRepr for Entry {}
// SAFETY: repr(C), six ints as in pairs.cuh.
unsafe impl DeviceRepr for Pair {}
// SAFETY: repr(C), three ints as in pairs.cuh.
unsafe impl DeviceRepr for Visit {}
