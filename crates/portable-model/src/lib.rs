//! The portable model: a folder as diffusers' `save_pretrained` writes it, with a `clearform.toml` beside the components.
//!
//! For a reader who knows diffusers: the folder is an ordinary pipeline, which `from_pretrained` opens too. What diffusers
//! has no place for is in `clearform.toml`: the attention plan, the source files, the settings of the distillation, and
//! the size and hash of every file.
//!
//! - [`PortableModel`] opens and verifies such a folder, [`ModelRecord`] is its `clearform.toml`.
//! - [`StagingDir`] assembles a new one in a folder beside the target, which appears under its name only when it is
//!   complete. [`ComponentData`] is a VAE or text encoder that is written from tensors.
//!
//! This crate moves files and tensors. It converts nothing and runs nothing.

mod component;
mod error;
mod model;
mod record;
mod staging;
mod verdict;

pub use component::ComponentData;
pub use error::{PortableModelError, Result};
pub use model::{PLAN_METADATA, PortableModel, VerifyReport, recorded_plan};
pub use record::{
    AdapterRecord, ComponentRecord, DistillationRecord, FileRecord, ModelRecord, PatchRecord, SourceRecord,
};
pub use staging::{CopyMode, Overwrite, StagingDir, check_target, surrounding_model};
pub use verdict::{ImageVerdict, LevelErrors, VerdictRecord};
