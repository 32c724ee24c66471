//! [`PerBlockList`]: a setting with an entry for each block, and where a manifest says that it is read.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::evidence::{TensorsByName, vote};
use crate::manifest::pattern::Pattern;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Where a list comes from.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PerBlockList {
    /// The rows of tensors of these patterns: for each block as most of its tensors have them.
    Rows(Vec<String>),
    /// Another list from its end.
    Reversed(String),
    /// What enters each block, where another list says what leaves it. The first gives as much as it takes.
    Inputs(String),
    /// The blocks where two lists differ.
    Unequal([String; 2]),
    /// A value, once for each entry of another list.
    Each(Value, String),
}

impl PerBlockList {
    /// The entries, and what shows them; none where a block shows nothing.
    pub fn find(&self, tensors: &TensorsByName, sizes: &ConfigValues) -> Option<(Vec<Value>, String)> {
        let of = |key: &str| Some((sizes.list(key)?.to_vec(), format!("{key:?}")));
        match self {
            Self::Rows(patterns) => rows(patterns, tensors),
            Self::Reversed(key) => of(key).map(|(list, witness)| (list.into_iter().rev().collect(), witness)),
            Self::Inputs(key) => {
                let (list, witness) = of(key)?;
                Some((list.first().into_iter().chain(&list).take(list.len()).cloned().collect(), witness))
            }
            Self::Unequal([first, second]) => {
                let ((first, witness), (second, _)) = (of(first)?, of(second)?);
                let unequal = first.iter().zip(&second).enumerate().filter(|(_, (first, second))| first != second);
                Some((unequal.map(|(block, _)| block.into()).collect(), witness))
            }
            Self::Each(value, key) => of(key).map(|(list, witness)| (vec![value.clone(); list.len()], witness)),
        }
    }

    /// Whether it lists numbers of blocks.
    pub fn names_blocks(&self) -> bool {
        matches!(self, Self::Unequal(_))
    }
}

fn rows(patterns: &[String], tensors: &TensorsByName) -> Option<(Vec<Value>, String)> {
    let mut rows: BTreeMap<usize, Vec<(usize, &str)>> = BTreeMap::new();
    for pattern in patterns.iter().map(|pattern| Pattern::new(pattern)) {
        for (name, tensor) in tensors {
            let number = pattern.captures(name).and_then(|captures| captures.number);
            if let (Some(number), Some(extent)) = (number, tensor.shape.first()) {
                rows.entry(number).or_default().push((*extent, name));
            }
        }
    }
    let whole = !rows.is_empty() && rows.keys().copied().eq(0..rows.len());
    let most = whole.then(|| rows.into_values().filter_map(vote).map(|(extent, _)| extent.into()))?;
    Some((most.collect(), format!("the rows of {:?}", patterns[0])))
}
