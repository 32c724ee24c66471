//! From a checkpoint to a portable model, and attention patches.
//!
//! The main types are [`ConversionPlan`], which is applied to a [`Stage`] and reports what it did, and
//! [`PortableModel`], the folder that comes out. This crate moves tensors and files; it runs no model.

mod error;
mod model;
mod origin;
mod part;
mod patch;
mod plan;
mod record;
mod stage;

pub use error::{ConvertError, Result};
pub use model::{PortableModel, VerifyReport, recorded_plan};
pub use origin::Origins;
pub use part::Part;
pub use patch::{Mode, Patch, Patched};
pub use plan::{ConversionPlan, Report, TRANSFORMER};
pub use record::{AdapterRecord, Distillation, FileRecord, Record, SourceRecord};
pub use stage::{Placing, Replace, Stage};
