//! A CUDA device for machines without one: `libcuda`, `libcublas` and `libcurand` whose kernels run on the CPU, from the same
//! PTX that a GPU would be given. Programs that link NVIDIA's libraries run unchanged, some thousand times slower.
//!
//! It is strict where a device is silent. Accesses outside of an allocation, misaligned ones, divergence at a barrier and
//! shuffles with inactive lanes end the launch with the instruction's text. New memory, shared memory and registers are
//! NaN, asynchronous copies land as late as possible, and freed memory is gone at once. It knows nothing of time, nor of
//! streams that overlap. Allocations of 256 MiB or more are the exception to NaN: they are zeros that take no memory
//! until they are written, so that tensors larger than the machine's memory can be addressed.
//!
//! It executes PTX only. Machine code is refused as on a device that it was not made for.
//!
//! With compute capability 9.0 it also has `mbarrier`, bulk tensor copies and `wgmma`. A copy's destination is NaN until
//! the copy lands, which it does when its barrier lacks nothing else. The matrices of a `wgmma` must not change, and its
//! sums are NaN, until it is waited for. Warps that wait for each other forever end the launch. There are no clusters; bulk
//! copies go to shared memory only and have 16-bit elements; `wgmma` has f32 sums and the 128-byte swizzle. A missing
//! `fence.proxy.async` goes unnoticed.
//!
//! Environment variables: `SIMULATOR_CAPABILITY` chooses the [`device`], `SIMULATOR_ORDER`, `SIMULATOR_COPIES` and
//! `SIMULATOR_PEDANTIC` the [`schedule`], `SIMULATOR_REPORT` the file of a [`report`].

mod arithmetic;
mod barriers;
mod convert;
mod cublas;
mod curand;
mod decode;
pub mod device;
pub mod driver;
mod instruction;
mod launch;
mod memory;
mod program;
mod ptx;
pub mod report;
pub mod schedule;
mod tensor_map;
mod warp;
