//! [`FamilyRegistry`]: the families that a program knows.

use crate::{FAMILIES, ModelFamily};
use std::fmt;

/// The families that a program knows: [`FAMILIES`], unless it brings its own.
#[derive(Clone, Copy)]
pub struct FamilyRegistry(&'static [&'static dyn ModelFamily]);

impl FamilyRegistry {
    /// Knows `families`, and no others. Their manifests are read with those of the layouts.
    pub fn new(families: &'static [&'static dyn ModelFamily]) -> Self {
        Self(families)
    }

    /// The family called `name` in the manifests.
    pub fn get(&self, name: &str) -> Option<&'static dyn ModelFamily> {
        self.0.iter().find(|family| family.name() == name).copied()
    }

    fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|family| family.name()).collect()
    }
}

impl Default for FamilyRegistry {
    fn default() -> Self {
        Self(FAMILIES)
    }
}

impl PartialEq for FamilyRegistry {
    fn eq(&self, other: &Self) -> bool {
        self.names() == other.names()
    }
}

impl fmt::Debug for FamilyRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
