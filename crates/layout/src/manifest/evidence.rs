//! How settings are read from tensors: sizes by a majority of shapes, numbers of blocks from names.

use crate::manifest::pattern::Pattern;
use clearform_weights::TensorInfo;
use std::collections::{BTreeMap, BTreeSet};

/// The tensors of a checkpoint by canonical name.
pub(crate) type TensorsByName = BTreeMap<String, TensorInfo>;

/// The value with most votes, and the first tensor that has it. One misshapen tensor must not decide a size, or all
/// the others would be reported as misshapen.
pub(crate) fn vote(votes: Vec<(usize, &str)>) -> Option<(usize, &str)> {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    votes.iter().for_each(|(value, _)| *counts.entry(*value).or_default() += 1);
    let most = counts.values().max()?;
    votes.iter().copied().find(|(value, _)| counts[value] == *most)
}

/// The block numbers in the names of `tensors` that begin with the pattern `prefix`.
pub(crate) fn block_numbers(prefix: &str, tensors: &TensorsByName) -> BTreeSet<usize> {
    let pattern = Pattern::new(prefix);
    let number = |name: &String| pattern.captures_start(name).and_then(|(captures, _)| captures.number);
    tensors.keys().filter_map(number).collect()
}

/// How many blocks a model has. If more than half of the numbers up to the highest occur, it has that many, so that a
/// lost block is reported as missing. Otherwise it has as many as there are before the first gap: a single stray name
/// with a high number must not make hundreds of blocks missing.
pub(crate) fn block_count(numbers: &BTreeSet<usize>) -> usize {
    let highest = numbers.last().map_or(0, |last| last + 1);
    if numbers.len() * 2 > highest { highest } else { (0..).zip(numbers).take_while(|(at, n)| at == *n).count() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_of_most_tensors_wins_and_of_equals_the_first() {
        assert_eq!(vote(vec![(7, "a"), (8, "b"), (8, "c")]), Some((8, "b")));
        assert_eq!(vote(vec![(7, "a"), (8, "b"), (8, "c"), (7, "d")]), Some((7, "a")));
        assert_eq!(vote(Vec::new()), None);
    }

    #[test]
    fn lost_blocks_are_counted_and_stray_numbers_are_not() {
        for (numbers, expected) in [
            (&[][..], 0),
            (&[0, 1, 2], 3),
            (&[0, 1, 3], 4),
            (&[1, 2], 3),
            (&[0, 1, 3, 5], 6),
            (&[0, 3], 1),
            (&[0, 1, 2, 9], 3),
            (&[5], 0),
        ] {
            assert_eq!(block_count(&numbers.iter().copied().collect()), expected, "{numbers:?}");
        }
    }
}
