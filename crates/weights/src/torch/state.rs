//! [`StateDict`]: finds the weights in a pickle.
//!
//! Training scripts wrap the state dict in a dict of their own, with optimizer state and arguments. If there is a
//! moving average (EMA) of the weights it is chosen, because that is what authors publish and evaluate. A note lists
//! everything left out.

use super::globals::ARRAY_KIND;
use super::pickle::Pickle;
use super::storage::TorchTensor;
use super::value::{PickleValue, ValueArena, ValueId};
use super::{Validated, printed};
use std::collections::{BTreeMap, HashSet};

/// Keys of a moving average of the weights.
const AVERAGES: &[&str] = &["ema", "ema_state_dict", "model_ema", "params_ema", "state_dict_ema"];
/// Other keys of the weights, most specific first.
const WEIGHTS: &[&str] = &["state_dict", "model_state_dict", "model", "module", "params"];
/// Dicts in dicts that are searched; training scripts nest one or two.
const MOST_WRAPPERS: usize = 4;
/// As in a safetensors header.
const MOST_TENSORS: usize = 50_000;
const LONGEST_NAME: usize = 4096;
/// Entries that a note lists.
const MOST_LISTED: usize = 16;

/// A state dict.
#[derive(Debug)]
pub(super) struct StateDict<'p> {
    pub tensors: BTreeMap<&'p str, &'p TorchTensor>,
    /// What was chosen and what was left out.
    pub notes: Vec<String>,
}

type DictItems<'p> = &'p [(ValueId, ValueId)];

/// Finds the state dict of `pickle`.
pub(super) fn find<'p>(pickle: &'p Pickle) -> Validated<StateDict<'p>> {
    let values = &pickle.values;
    let mut notes = Vec::new();
    let PickleValue::Dict(pairs) = values.get(pickle.root) else {
        let found = values.get(pickle.root).describe();
        return Err(format!("expected a dict of tensors by name, found {found}: save a state_dict"));
    };
    let mut pairs: DictItems = pairs;
    for _ in 0..MOST_WRAPPERS {
        check_keys(values, pairs)?;
        let Some((key, inner)) = wrapped(values, pairs) else { break };
        notes.push(choice_note(values, pairs, key));
        pairs = inner;
    }
    let tensors = tensors(values, pairs)?;
    let others = list_entries(values, pairs, |value| !matches!(value, PickleValue::Tensor(_)));
    notes.extend(others.map(|list| format!("left out: {list}")));
    Ok(StateDict { tensors, notes })
}

/// Refuses repeated keys, which no dict of Python has.
fn check_keys(values: &ValueArena, pairs: DictItems) -> Validated<()> {
    let mut seen = HashSet::new();
    let texts = pairs.iter().filter_map(|&(key, _)| values.text(key).ok());
    match texts.into_iter().find(|key| !seen.insert(*key)) {
        Some(twice) => Err(format!("key {} is given twice", printed(twice))),
        None => Ok(()),
    }
}

/// The entry that holds the weights, if `pairs` is a wrapper: one with a known key, or the only one with tensors.
fn wrapped<'p>(values: &'p ValueArena, pairs: DictItems<'p>) -> Option<(&'p str, DictItems<'p>)> {
    let dicts = || {
        pairs.iter().filter_map(|&(key, id)| match values.get(id) {
            PickleValue::Dict(inner) => Some((values.text(key).ok()?, id, inner.as_slice())),
            _ => None,
        })
    };
    let known = AVERAGES.iter().chain(WEIGHTS);
    let mut seen = HashSet::new();
    for wanted in known {
        let found = dicts().find(|(key, ..)| key == wanted);
        if let Some((key, _, inner)) = found.filter(|&(_, id, _)| holds(values, id, &mut seen)) {
            return Some((key, inner));
        }
    }
    let mut others = dicts().filter(|&(_, id, inner)| seen.insert(id) && has_tensors(values, inner));
    match (has_tensors(values, pairs), others.next(), others.next()) {
        (false, Some((key, _, only)), None) => Some((key, only)),
        _ => None,
    }
}

/// Whether the dict `id` is a state dict or wraps one. `seen` are dicts that were searched before without success.
fn holds(values: &ValueArena, id: ValueId, seen: &mut HashSet<ValueId>) -> bool {
    let mut open = vec![id];
    while let Some(id) = open.pop() {
        let PickleValue::Dict(pairs) = values.get(id) else { continue };
        if !seen.insert(id) {
            continue;
        }
        if has_tensors(values, pairs) {
            return true;
        }
        let known = |key| values.text(key).is_ok_and(|key| AVERAGES.contains(&key) || WEIGHTS.contains(&key));
        open.extend(pairs.iter().filter(|pair| known(pair.0)).map(|pair| pair.1));
    }
    false
}

fn has_tensors(values: &ValueArena, pairs: DictItems) -> bool {
    pairs.iter().any(|&(_, id)| matches!(values.get(id), PickleValue::Tensor(_)))
}

fn tensors<'p>(values: &'p ValueArena, pairs: DictItems<'p>) -> Validated<BTreeMap<&'p str, &'p TorchTensor>> {
    let mut tensors = BTreeMap::new();
    for &(key, id) in pairs {
        match (values.get(key), values.get(id)) {
            (PickleValue::Text(name), PickleValue::Tensor(tensor)) => {
                check_name(name)?;
                tensors.insert(*name, tensor.as_ref());
            }
            (other, PickleValue::Tensor(_)) => {
                return Err(format!("the key of a tensor is {}, expected a name", other.describe()));
            }
            (PickleValue::Text(name), PickleValue::Other(ARRAY_KIND)) => {
                return Err(format!(
                    "{} is {ARRAY_KIND}, expected tensors: convert it with torch.from_numpy",
                    printed(name)
                ));
            }
            _ => {}
        }
    }
    match tensors.len() {
        0 => {
            let found = list_entries(values, pairs, |_| true).unwrap_or_else(|| "an empty dict".to_owned());
            Err(format!(
                "no state dict in it, expected tensors by name, found {found}: save the state_dict of one model"
            ))
        }
        1..=MOST_TENSORS => Ok(tensors),
        count => Err(format!("{count} tensors, more than the {MOST_TENSORS} allowed")),
    }
}

fn check_name(name: &str) -> Validated<()> {
    match name.len() {
        0..=LONGEST_NAME => Ok(()),
        length => Err(format!("a name of {length} bytes, longer than the {LONGEST_NAME} allowed")),
    }
}

/// A note on the chosen entry and on what is left out.
fn choice_note(values: &ValueArena, pairs: DictItems, key: &str) -> String {
    let what = if AVERAGES.contains(&key) { "the moving average of the training, " } else { "" };
    let others: Vec<(ValueId, ValueId)> = pairs.iter().copied().filter(|pair| values.text(pair.0) != Ok(key)).collect();
    let left_out = list_entries(values, &others, |_| true).map(|list| format!("; left out: {list}"));
    format!("the weights are {what}{}{}", printed(key), left_out.unwrap_or_default())
}

/// The entries whose values are `wanted`, with what each is; `None` if there are none.
fn list_entries(values: &ValueArena, pairs: DictItems, wanted: impl Fn(&PickleValue) -> bool) -> Option<String> {
    let found: Vec<&(ValueId, ValueId)> = pairs.iter().filter(|pair| wanted(values.get(pair.1))).collect();
    let describe_entry = |&&(key, id): &&(ValueId, ValueId)| {
        let key = values.text(key).map_or_else(|_| values.get(key).describe(), printed);
        format!("{key} ({})", values.get(id).describe())
    };
    let mut list: Vec<String> = found.iter().take(MOST_LISTED).map(describe_entry).collect();
    if found.len() > MOST_LISTED {
        list.push(format!("and {} more", found.len() - MOST_LISTED));
    }
    (!list.is_empty()).then(|| list.join(", "))
}
