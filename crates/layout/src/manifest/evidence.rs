//! What the tensors of a checkpoint show of a setting: extents by vote, numbers in names.

use crate::manifest::pattern::Pattern;
use clearform_weights::TensorInfo;
use std::collections::{BTreeMap, BTreeSet};

/// Tensors that may show a setting, by name.
pub(crate) type TensorsByName = BTreeMap<String, TensorInfo>;

/// What most say, and who says it first.
pub(crate) fn vote(votes: Vec<(usize, &str)>) -> Option<(usize, &str)> {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    votes.iter().for_each(|(value, _)| *counts.entry(*value).or_default() += 1);
    let most = counts.values().max()?;
    votes.iter().copied().find(|(value, _)| counts[value] == *most)
}

/// The block numbers that follow `prefix` in the names of `tensors`.
pub(crate) fn numbers(prefix: &str, tensors: &TensorsByName) -> BTreeSet<usize> {
    let pattern = Pattern::new(prefix);
    let number = |name: &String| pattern.captures_start(name).and_then(|(captures, _)| captures.number);
    tensors.keys().filter_map(number).collect()
}

/// How many blocks there are: up to the highest number where most numbers below it occur, so that a missing block is
/// found missing; else up to the first gap.
pub(crate) fn count(numbers: &BTreeSet<usize>) -> usize {
    let highest = numbers.last().map_or(0, |last| last + 1);
    if numbers.len() * 2 > highest { highest } else { (0..).zip(numbers).take_while(|(at, n)| at == *n).count() }
}
