//! [`PerBlockList`]: how a setting with an entry per block, such as a VAE's channels, is read from the tensors.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::evidence::{TensorsByName, vote};
use crate::manifest::pattern::Pattern;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Where a list is read.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PerBlockList {
    /// The numbers of rows of tensors with these patterns; for each block, that of most of its tensors.
    Rows(Vec<String>),
    /// Another list in reverse order.
    Reversed(String),
    /// The input channels of each block, where another list has the output channels. The first block has as many inputs
    /// as outputs.
    Inputs(String),
    /// The numbers of the blocks for which two lists differ.
    Unequal([String; 2]),
    /// A value, repeated for each entry of another list.
    Each(Value, String),
}

impl PerBlockList {
    /// The list and where it was found; `None` if it is unknown for some block.
    pub fn find(&self, tensors: &TensorsByName, sizes: &ConfigValues) -> Option<(Vec<Value>, String)> {
        let (list, witness) = match self {
            Self::Rows(patterns) => return rows(patterns, tensors),
            Self::Reversed(key) => (sizes.list(key)?.iter().rev().cloned().collect(), key),
            Self::Inputs(key) => {
                let outputs = sizes.list(key)?;
                (outputs.first().into_iter().chain(outputs).take(outputs.len()).cloned().collect(), key)
            }
            Self::Unequal([first, second]) => {
                let pairs = sizes.list(first)?.iter().zip(sizes.list(second)?).enumerate();
                let unequal = pairs.filter(|(_, (first, second))| first != second);
                (unequal.map(|(block, _)| block.into()).collect(), first)
            }
            Self::Each(value, key) => (vec![value.clone(); sizes.list(key)?.len()], key),
        };
        Some((list, format!("{witness:?}")))
    }

    /// Whether its entries are numbers of blocks.
    pub fn lists_block_numbers(&self) -> bool {
        matches!(self, Self::Unequal(_))
    }
}

fn rows(patterns: &[String], tensors: &TensorsByName) -> Option<(Vec<Value>, String)> {
    let mut votes: BTreeMap<usize, Vec<(usize, &str)>> = BTreeMap::new();
    for pattern in patterns.iter().map(|pattern| Pattern::new(pattern)) {
        for (name, tensor) in tensors {
            let number = pattern.captures(name).and_then(|captures| captures.number);
            if let (Some(number), Some(rows)) = (number, tensor.shape.first()) {
                votes.entry(number).or_default().push((*rows, name));
            }
        }
    }
    let has_all_blocks = !votes.is_empty() && votes.keys().copied().eq(0..votes.len());
    let list = has_all_blocks.then(|| votes.into_values().filter_map(vote).map(|(rows, _)| rows.into()))?;
    Some((list.collect(), format!("the rows of {:?}", patterns[0])))
}
