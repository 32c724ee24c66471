//! [`start`]: a launch on a device, through cudarc and on a stream that someone else owns; [`ResidentLists`] are lists in
//! its memory. The only file that knows a driver; it knows no tensor.

use crate::clear_attention::{Entry, Lists, Work};
use crate::{Launch, Parameters, THREADS};
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
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
        LaunchConfig { grid_dim: (x, y, z), block_dim: (THREADS, 1, 1), shared_mem_bytes: launch.shared_bytes };
    // SAFETY: the caller's promise; `Parameters` has the layout of the one argument there is.
    unsafe { builder.launch(config) }.map(drop)
}

/// Lists in memory of a device.
pub struct ResidentLists {
    /// [`Lists::work`].
    pub work: CudaSlice<Work>,
    /// [`Lists::joins`]; one that names no row where there are none.
    pub joins: CudaSlice<Work>,
    /// [`Lists::entries`].
    pub entries: CudaSlice<Entry>,
    /// [`Lists::masks`]; one word where there are none.
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

struct Argument<P>(P);

// SAFETY: `Parameters` promises the layout of the kernel's argument.
unsafe impl<P: Parameters> DeviceRepr for Argument<P> {}
// SAFETY: repr(C), five ints as in common.cuh.
unsafe impl DeviceRepr for Work {}
// SAFETY: repr(C), three ints as in common.cuh.
unsafe impl DeviceRepr for Entry {}
