//! From a checkpoint to a portable model, and attention patches.
//!
//! The main types are [`ConversionPlan`], which is applied to a stage of a portable model and reports what it did, and
//! [`AttentionPatch`], the distilled attention of a model as one file. This crate moves tensors; it runs no model.

mod error;
mod patch;
mod plan;
mod source_hashes;

pub use error::{ConvertError, Result};
pub use patch::{AttentionPatch, PatchMode, PatchedAttention};
pub use plan::{ConversionPlan, ConversionReport, TRANSFORMER};
pub use source_hashes::SourceHashes;
