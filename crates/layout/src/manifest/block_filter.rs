//! [`BlockFilter`]: which of a model's blocks a line of a manifest is for.

use crate::manifest::config_values::ConfigValues;

/// The word for the highest block. Any other word is the key of a setting that lists block numbers.
const LAST: &str = "last";

/// A selection of blocks; by default all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BlockFilter {
    /// Only these blocks.
    pub only: Option<String>,
    /// All blocks except these.
    pub except: Option<String>,
}

impl BlockFilter {
    /// Whether it selects all blocks.
    pub fn is_all(&self) -> bool {
        self.only.is_none() && self.except.is_none()
    }

    /// Whether it selects block `number` of `count`.
    pub fn contains(&self, number: usize, count: usize, sizes: &ConfigValues) -> bool {
        let is_among = |word: &String| match word.as_str() {
            LAST => number + 1 == count,
            key => sizes.list_contains(key, number),
        };
        self.only.as_ref().is_none_or(is_among) && !self.except.as_ref().is_some_and(is_among)
    }

    /// The keys of the settings that it refers to.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.only.iter().chain(&self.except).map(String::as_str).filter(|word| *word != LAST)
    }
}
