//! The architectures, one folder each, and the list of them.

use crate::ModelFamily;

pub mod dit;
pub mod flux;
pub mod minrf;
pub mod pixart;
pub mod sd3;
pub mod sit;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

/// Every family, alphabetically.
pub const FAMILIES: &[&dyn ModelFamily] =
    &[&dit::Dit, &flux::Flux, &minrf::Minrf, &pixart::Pixart, &sd3::Sd3, &sit::Sit];
