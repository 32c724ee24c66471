//! The portable model: a folder in diffusers' form with a clearform.toml beside it.
//!
//! The main types are [`PortableModel`], such a folder that is open, [`ModelRecord`], what its clearform.toml says, and
//! [`StagingDir`], a model being put together: it appears under its name only when it is whole. This crate moves files and
//! tensors; it converts nothing and runs nothing.

mod component;
mod error;
mod model;
mod record;
mod staging;

pub use component::ComponentData;
pub use error::{PortableModelError, Result};
pub use model::{PortableModel, VerifyReport, recorded_plan};
pub use record::{AdapterRecord, DistillationRecord, FileRecord, ModelRecord, SourceRecord};
pub use staging::{CopyMode, Overwrite, StagingDir};
