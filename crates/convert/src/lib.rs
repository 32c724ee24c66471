//! From a checkpoint to a portable model, and attention patches.
//!
//! For a reader who knows diffusers: a [`ConversionPlan`] is `from_single_file` followed by `save_pretrained`. It writes a
//! transformer under the names of its diffusers class, records the attention that it is meant to run with, and takes the
//! other components of the pipeline along; [`ConversionReport`] lists what became of every tensor. An
//! [`AttentionPatch`] is one safetensors file with only the weights that distillation changed, much like a LoRA file but
//! with whole weights, and can be applied to other models of the same architecture.
//!
//! Tensors are read, converted and written one at a time, so memory does not grow with the model. This crate runs no
//! model; the folder format itself is `clearform_portable_model`.

mod error;
mod model_card;
mod patch;
mod plan;
mod quantization;
mod source_hashes;

pub use error::{ConvertError, Result};
pub use patch::{AttentionOverlay, AttentionPatch, BaseDifference, PatchMode};
pub use plan::{ConversionPlan, ConversionReport, TRANSFORMER_FILE};
pub use quantization::GgufPlan;
pub use source_hashes::{SourceHashes, source_record};
