//! The architectures, a folder each.

pub mod dit;
pub mod flux;
pub mod minrf;
pub mod pixart;
pub mod sd3;
pub mod sit;
