//! [`BlockFilter`]: which of a model's blocks a line of a manifest speaks of.

use crate::manifest::config_values::ConfigValues;

/// The word for the highest block. Any other word is the key of a setting that lists block numbers.
const LAST: &str = "last";

/// Some of the blocks; all of them where nothing is said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BlockFilter {
    /// Those alone.
    pub only: Option<String>,
    /// All but those.
    pub except: Option<String>,
}

impl BlockFilter {
    /// Whether all blocks are meant.
    pub fn are_all(&self) -> bool {
        self.only.is_none() && self.except.is_none()
    }

    /// Whether block `number` of `count` is meant.
    pub fn hold(&self, number: usize, count: usize, sizes: &ConfigValues) -> bool {
        let among = |word: &String| match word.as_str() {
            LAST => number + 1 == count,
            key => sizes.lists(key, number),
        };
        self.only.as_ref().is_none_or(among) && !self.except.as_ref().is_some_and(among)
    }

    /// The keys of settings that are named.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.only.iter().chain(&self.except).map(String::as_str).filter(|word| *word != LAST)
    }
}
