//! [`ValueArena`]: everything a pickle builds, side by side in one list.
//!
//! What holds others names them by their numbers: sharing costs nothing, a value may hold itself, and nothing here
//! recurses, however deep the nesting. It knows no opcodes.

use super::Validated;
use super::globals::Global;
use super::storage::TorchTensor;

/// A pickle of 50 000 tensors builds fewer.
const MOST_VALUES: usize = 1 << 21;
/// Items of all lists, tuples and dicts together, which a shared argument could multiply.
const MOST_ITEMS: usize = 1 << 23;
/// Tensors with all that is theirs, so many of which fill 200 MB.
const MOST_TENSORS: usize = 200_000;
/// As in a safetensors header.
const MOST_AXES: usize = 32;
/// Training states nest about ten deep.
const DEEPEST: u32 = 500;

/// The number of a value.
pub(super) type ValueId = u32;

/// One thing that a pickle builds.
#[derive(Debug)]
pub(super) enum PickleValue<'a> {
    None,
    Truth(bool),
    Integer(i128),
    Text(&'a str),
    Tuple(Vec<ValueId>),
    List(Vec<ValueId>),
    Dict(Vec<(ValueId, ValueId)>),
    /// A class or function on the list of those that are known.
    Global(Global),
    /// The number of a storage.
    Storage(usize),
    Tensor(Box<TorchTensor>),
    /// What no tensor needs, by its kind.
    Other(&'static str),
}

/// All values of a pickle.
#[derive(Debug, Default)]
pub(super) struct ValueArena<'a> {
    values: Vec<(PickleValue<'a>, u32)>,
    items: usize,
    tensors: usize,
}

impl<'a> ValueArena<'a> {
    /// Adds one whose contents are here already.
    pub fn add(&mut self, value: PickleValue<'a>) -> Validated<ValueId> {
        if self.values.len() >= MOST_VALUES {
            return Err(format!("more than {MOST_VALUES} values"));
        }
        let (items, depth) = match &value {
            PickleValue::Tuple(items) | PickleValue::List(items) => (items.len(), self.deepest(items)),
            PickleValue::Dict(pairs) => (pairs.len(), pairs.iter().map(|pair| self.depth(pair.1)).max().unwrap_or(0)),
            _ => (0, 0),
        };
        self.hold(items)?;
        self.tensors += usize::from(matches!(value, PickleValue::Tensor(_)));
        if self.tensors > MOST_TENSORS {
            return Err(format!("more than {MOST_TENSORS} tensors"));
        }
        self.values.push((value, deeper(depth)?));
        Ok((self.values.len() - 1) as ValueId)
    }

    pub fn get(&self, id: ValueId) -> &PickleValue<'a> {
        &self.values[id as usize].0
    }

    /// Counts `items` more that something holds.
    fn hold(&mut self, items: usize) -> Validated<()> {
        self.items += items;
        if self.items <= MOST_ITEMS { Ok(()) } else { Err(format!("more than {MOST_ITEMS} items")) }
    }

    /// Adds `items` to the end of a list. Sets are not kept, nor is what is added to them.
    pub fn append(&mut self, list: ValueId, items: &[ValueId]) -> Validated<()> {
        self.hold(items.len())?;
        let depth = deeper(self.deepest(items))?;
        match &mut self.values[list as usize] {
            (PickleValue::List(present), known) => {
                present.extend(items);
                *known = depth.max(*known);
                Ok(())
            }
            (PickleValue::Other(_), _) => Ok(()),
            (other, _) => Err(format!("something is appended to {}", other.describe())),
        }
    }

    /// Puts keys and values, in turns, into a dict.
    pub fn put(&mut self, dict: ValueId, items: &[ValueId]) -> Validated<()> {
        self.hold(items.len())?;
        let depth = deeper(self.deepest(items))?;
        match &mut self.values[dict as usize] {
            (PickleValue::Dict(present), known) if items.len().is_multiple_of(2) => {
                present.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                *known = depth.max(*known);
                Ok(())
            }
            (other, _) => Err(format!("{} keys and values are put into {}", items.len(), other.describe())),
        }
    }

    /// The items of a tuple.
    pub fn tuple(&self, id: ValueId) -> Validated<&[ValueId]> {
        match self.get(id) {
            PickleValue::Tuple(items) => Ok(items),
            other => Err(format!("expected a tuple, found {}", other.describe())),
        }
    }

    pub fn text(&self, id: ValueId) -> Validated<&'a str> {
        match self.get(id) {
            PickleValue::Text(text) => Ok(text),
            other => Err(format!("expected text, found {}", other.describe())),
        }
    }

    pub fn global(&self, id: ValueId) -> Validated<Global> {
        match self.get(id) {
            PickleValue::Global(global) => Ok(*global),
            other => Err(format!("expected a type or function, found {}", other.describe())),
        }
    }

    /// A number that counts something.
    pub fn count(&self, id: ValueId) -> Validated<u64> {
        match self.get(id) {
            PickleValue::Integer(number) => {
                u64::try_from(*number).map_err(|_| format!("expected a number of things, found {number}"))
            }
            other => Err(format!("expected a number of things, found {}", other.describe())),
        }
    }

    /// A tuple of such numbers, one per axis.
    pub fn counts(&self, id: ValueId) -> Validated<Vec<u64>> {
        match self.tuple(id)? {
            axes if axes.len() <= MOST_AXES => axes.iter().map(|&item| self.count(item)).collect(),
            axes => Err(format!("{} axes, more than the {MOST_AXES} allowed", axes.len())),
        }
    }

    fn depth(&self, id: ValueId) -> u32 {
        self.values[id as usize].1
    }

    fn deepest(&self, items: &[ValueId]) -> u32 {
        items.iter().map(|&item| self.depth(item)).max().unwrap_or(0)
    }
}

impl PickleValue<'_> {
    /// What it is, for a person.
    pub fn describe(&self) -> String {
        match self {
            Self::None => "nothing".to_owned(),
            Self::Truth(_) => "a truth value".to_owned(),
            Self::Integer(_) => "a number".to_owned(),
            Self::Text(_) => "text".to_owned(),
            Self::Tuple(items) => format!("a tuple of {}", items.len()),
            Self::List(items) => format!("a list of {}", items.len()),
            Self::Dict(pairs) => format!("a dict of {}", pairs.len()),
            Self::Global(_) => "a type or function".to_owned(),
            Self::Storage(_) => "a storage".to_owned(),
            Self::Tensor(_) => "a tensor".to_owned(),
            Self::Other(what) => (*what).to_owned(),
        }
    }
}

fn deeper(depth: u32) -> Validated<u32> {
    if depth < DEEPEST { Ok(depth + 1) } else { Err(format!("values nested more than {DEEPEST} deep")) }
}
