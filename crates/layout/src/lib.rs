//! Which model a checkpoint holds, in which layout, and its tensors under their canonical names.
//!
//! The main types are [`Manifests`], the rules as data, [`Unscaled`], a checkpoint whose fp8 weights are made plain,
//! [`Identified`], what [`detect`] found, and [`Canonical`], a checkpoint as seen through the rules. [`Inside`] is a VAE
//! or a text encoder that lies in the same file. All that is particular to a family stands in `manifests/<family>.toml`,
//! and to a kind of part in `manifests/parts/`; this crate knows none of them and does no arithmetic on weights: it moves
//! bytes.

mod account;
mod addresses;
mod assembly;
mod blocks;
mod choose;
mod detect;
mod error;
mod estimate;
mod family;
mod inspection;
mod known;
mod list;
mod manifests;
mod mapping;
mod names;
mod near;
mod parts;
mod pattern;
mod printed;
mod rule;
mod setting;
mod settings;
mod shape;
mod under;
mod unscaled;
mod work;

pub use account::{Account, Contradiction, Fate, Misshapen, Missing};
pub use addresses::{Addresses, Parameter, Segment};
pub use assembly::{Canonical, Exported, Mapped};
pub use detect::{Beside, Hints, Identified, detect, detect_source};
pub use error::{LayoutError, Result};
pub use estimate::{Estimate, Linear};
pub use family::{Defaults, Variant};
pub use inspection::{Inspection, Stored, Unused};
pub use manifests::Manifests;
pub use parts::{Inside, Part};
pub use pattern::glob;
pub use shape::Expected;
pub use under::Under;
pub use unscaled::Unscaled;
