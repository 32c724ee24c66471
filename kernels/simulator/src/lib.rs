//! A CUDA device for machines without one: `libcuda` and `libcublas` whose kernels run on the CPU, from the very PTX that
//! a GPU would be given. A program that links NVIDIA's libraries runs over it unchanged, some thousand times slower.
//!
//! It is strict where a device is silent: an access outside of what is allocated, a misaligned one, lanes that part at a
//! barrier or exchange values with lanes that are elsewhere end the launch with the instruction's text. New memory holds
//! no numbers, copies to shared memory land as late as they may, and freed memory is gone at once. Time, and streams that
//! overlap, it does not know.
//!
//! It is one of compute capability 8.0, or of 9.0 with `SIMULATOR_CAPABILITY=90`. That one copies boxes of tensors, which
//! land when a barrier in shared memory misses nothing else; warps that wait for each other for ever end the launch.
//! Products of warpgroups are made when they are waited for: until then their sums are no numbers, and their factors must
//! not change. It has no clusters, copies boxes to shared memory alone, of numbers of 16 bits, and multiplies those with
//! sums in f32, in memory with a swizzle of 128 bytes; a missing `fence.proxy.async` goes unseen.

mod arithmetic;
mod barriers;
mod blas;
mod convert;
mod decode;
pub mod device;
pub mod driver;
mod execute;
mod hopper;
mod instruction;
mod launch;
mod matrices;
mod memory;
mod products;
mod program;
mod random;
pub mod report;
pub mod tensor_map;
mod text;
mod warp;
