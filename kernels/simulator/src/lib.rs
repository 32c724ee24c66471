//! A CUDA device for machines without one: `libcuda` and `libcublas` whose kernels run on the CPU, from the very PTX that
//! a GPU would be given. A program that links NVIDIA's libraries runs over it unchanged, some thousand times slower.
//!
//! It is strict where a device is silent: an access outside of what is allocated, a misaligned one, lanes that part at a
//! barrier or exchange values with lanes that are elsewhere end the launch with the instruction's text. New memory holds
//! no numbers, copies to shared memory land as late as they may, and freed memory is gone at once. Time, and streams that
//! overlap, it does not know.

mod arithmetic;
mod blas;
mod convert;
mod decode;
pub mod driver;
mod instruction;
mod launch;
mod matrices;
mod memory;
mod program;
mod random;
mod report;
mod text;
mod warp;
