//! Which model a checkpoint holds, in which layout, and its tensors under their canonical names.
//!
//! The main types are [`Manifests`], the rules as data, [`Unscaled`], a checkpoint whose fp8 weights are made plain,
//! [`Identified`], what [`detect`] found, and [`Canonical`], a checkpoint as seen through the rules. [`Inside`] is a VAE
//! or a text encoder that lies in the same file. All that is particular to a family stands in `manifests/<family>.toml`,
//! and to a kind of part in `manifests/parts/`; this crate knows none of them and does no arithmetic on weights: it moves
//! bytes.

mod detect;
mod error;
mod manifest;
mod mapping;
mod report;

pub use detect::embedded::{Inside, Part};
pub use detect::hints::Hints;
pub use detect::{Beside, Identified, detect, detect_source};
pub use error::{LayoutError, Result};
pub use manifest::Manifests;
pub use manifest::config::Contradiction;
pub use manifest::family::{Defaults, Variant};
pub use manifest::pattern::glob;
pub use manifest::shape::Expected;
pub use mapping::assembly::{Canonical, Exported, Mapped};
pub use mapping::dequantized::Unscaled;
pub use mapping::load_report::{Account, Fate, Misshapen, Missing};
pub use mapping::parameter_map::{Addresses, Parameter, Segment};
pub use mapping::prefix_view::Under;
pub use report::cost::{Estimate, Linear};
pub use report::inspection::{Inspection, Stored, Unused};
