//! Tensors on disk: open, check, stream, hash and write them.
//!
//! [`Checkpoint`] is a file or folder whose headers have been read and checked; [`TensorSource`] is the trait through
//! which the rest of the workspace reads weights. Files may be safetensors, `torch.save` (zip or legacy) or GGUF. The
//! crate knows no models: tensor names are opaque to it.
//!
//! Modules depend on each other in one direction: files and headers, then the formats (`gguf`, `torch`), then
//! [`Checkpoint`], which picks the format.

mod checkpoint;
mod content_hash;
mod error;
mod files;
mod folder;
mod fp8;
mod gguf;
mod header;
mod hub_cache;
mod json;
mod module_prefixes;
mod not_weights;
mod quantized;
mod source;
mod source_views;
mod storage_view;
mod stream;
mod tensor_file;
mod torch;
mod weight;
mod writer;

pub use checkpoint::{CONFIG_METADATA, Checkpoint, StoredTensor, opened_checkpoints};
pub use content_hash::content_hash;
pub use error::{Result, WeightsError};
pub use files::{digest, read_file, write_atomically};
pub use fp8::Fp8;
pub use gguf::{GgufEntry, GgufSink, block_format_for, block_format_name, block_format_named, write_gguf};
pub use hub_cache::hub_snapshot;
pub use json::read_json;
pub use not_weights::lfs_pointer;
pub use quantized::{QuantizedFormat, QuantizedMatrix};
pub use source::{
    Dtype, InMemoryTensors, RawTensor, TensorInfo, TensorSource, held_bytes, is_finite, is_quantized, is_weight_dtype,
};
pub use source_views::{ConvertedSource, SourceWithProducts, StreamedSource};
pub use stream::Digest;
pub use tensor_file::TensorFile;
pub use weight::{BaseWeight, LowRank, ProductPrecision, Weight};
pub use writer::{save, write};
