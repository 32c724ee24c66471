//! Tensors on disk: open, check, stream, hash and write them.
//!
//! The main types are [`Checkpoint`], the directory of a file or folder that was opened but not read, and
//! [`TensorSource`], the seam through which everything above pulls weights. This crate knows no model: names are
//! opaque to it.

mod checkpoint;
mod disguise;
mod error;
mod files;
mod folder;
mod fp8;
mod gguf;
mod header;
mod json;
mod source;
mod storage_view;
mod stream;
mod torch;
mod wrapped;
mod writer;

pub use checkpoint::{Checkpoint, StoredTensor, TensorFile};
pub use error::{Result, WeightsError};
pub use files::{digest, write_atomically};
pub use fp8::Fp8;
pub use source::{Dtype, InMemoryTensors, LowRank, RawTensor, TensorInfo, TensorSource};
pub use stream::Digest;
pub use writer::{save, write};
