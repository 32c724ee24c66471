//! The families, one folder each; [`crate::FAMILIES`] lists them.

pub mod flux;
