//! Which model a checkpoint holds, in which layout, and its tensors under their canonical names.
//!
//! The main types are [`Manifests`], the rules as data, [`Dequantized`], a checkpoint whose fp8 weights are made plain,
//! [`Identified`], what [`detect`] found, and [`CanonicalSource`], a checkpoint as seen through the rules. [`EmbeddedComponent`] is a VAE
//! or a text encoder that lies in the same file. All that is particular to a family stands in `manifests/<family>.toml`,
//! and to a kind of part in `manifests/parts/`; this crate knows none of them and does no arithmetic on weights: it moves
//! bytes.

mod detect;
mod error;
mod manifest;
mod mapping;
mod report;

pub use detect::embedded::{EmbeddedComponent, OpenComponent};
pub use detect::hints::Hints;
pub use detect::{Identified, Sidecar, detect, detect_source};
pub use error::{LayoutError, Result};
pub use manifest::Manifests;
pub use manifest::config::ConfigConflict;
pub use manifest::family::{SamplingDefaults, Variant};
pub use manifest::pattern::glob;
pub use manifest::shape::ExpectedTensor;
pub use mapping::assembly::{CanonicalSource, ExportedSource, MappedSource};
pub use mapping::dequantized::Dequantized;
pub use mapping::load_report::{LoadReport, MissingTensor, ShapeMismatch, TensorOutcome};
pub use mapping::parameter_map::{LayoutParameter, ParameterMap, RowSegment};
pub use mapping::prefix_view::PrefixView;
pub use report::cost::{ClearCost, CostEstimate};
pub use report::inspection::{Inspection, StorageFormat, UnusedTensor};
