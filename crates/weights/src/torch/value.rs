//! [`ValueArena`]: all values that a pickle builds, in one list.
//!
//! Lists, tuples and dicts refer to their items by index. So sharing costs nothing, a value may contain itself, and
//! nothing recurses, however deep the nesting.

use super::Validated;
use super::globals::Global;
use super::storage::TorchTensor;

/// A pickle of 50 000 tensors builds fewer.
const MOST_VALUES: usize = 1 << 21;
/// Items of all lists, tuples and dicts together: a few bytes of pickle can copy a long list again and again.
const MOST_ITEMS: usize = 1 << 23;
/// As many tensors with their shapes and strides take 200 MB.
const MOST_TENSORS: usize = 200_000;
/// As in a safetensors header.
const MOST_AXES: usize = 32;
/// Training states are nested about ten deep.
const DEEPEST: u32 = 500;

/// The index of a value.
pub(super) type ValueId = u32;

/// One value that a pickle builds.
#[derive(Debug)]
pub(super) enum PickleValue<'a> {
    None,
    Bool(bool),
    Integer(i128),
    Text(&'a str),
    Tuple(Vec<ValueId>),
    List(Vec<ValueId>),
    Dict(Vec<(ValueId, ValueId)>),
    /// A known class or function.
    Global(Global),
    /// The index of a storage.
    Storage(usize),
    Tensor(Box<TorchTensor>),
    /// A value that no tensor needs, by its kind.
    Other(&'static str),
}

/// All values of a pickle.
#[derive(Debug, Default)]
pub(super) struct ValueArena<'a> {
    /// Each value with the depth of its nesting.
    values: Vec<(PickleValue<'a>, u32)>,
    items: usize,
    tensors: usize,
}

impl<'a> ValueArena<'a> {
    /// Adds a value whose items were added before.
    pub fn add(&mut self, value: PickleValue<'a>) -> Validated<ValueId> {
        if self.values.len() >= MOST_VALUES {
            return Err(format!("more than {MOST_VALUES} values"));
        }
        let (items, depth) = match &value {
            PickleValue::Tuple(items) | PickleValue::List(items) => (items.len(), self.deepest(items)),
            PickleValue::Dict(pairs) => (pairs.len(), pairs.iter().map(|pair| self.depth(pair.1)).max().unwrap_or(0)),
            _ => (0, 0),
        };
        self.count_items(items)?;
        self.tensors += usize::from(matches!(value, PickleValue::Tensor(_)));
        if self.tensors > MOST_TENSORS {
            return Err(format!("more than {MOST_TENSORS} tensors"));
        }
        self.values.push((value, deeper(depth)?));
        Ok((self.values.len() - 1) as ValueId)
    }

    /// The value `id`.
    pub fn get(&self, id: ValueId) -> &PickleValue<'a> {
        &self.values[id as usize].0
    }

    fn count_items(&mut self, items: usize) -> Validated<()> {
        self.items += items;
        if self.items <= MOST_ITEMS { Ok(()) } else { Err(format!("more than {MOST_ITEMS} items")) }
    }

    /// Appends `items` to a list. For a set, which is not kept, it does nothing.
    pub fn append(&mut self, list: ValueId, items: &[ValueId]) -> Validated<()> {
        self.count_items(items.len())?;
        let depth = deeper(self.deepest(items))?;
        match &mut self.values[list as usize] {
            (PickleValue::List(present), known) => {
                present.extend(items);
                *known = depth.max(*known);
                Ok(())
            }
            (PickleValue::Other(_), _) => Ok(()),
            (other, _) => Err(format!("an item is appended to {}", other.describe())),
        }
    }

    /// Adds alternating keys and values to a dict.
    pub fn put(&mut self, dict: ValueId, items: &[ValueId]) -> Validated<()> {
        self.count_items(items.len())?;
        let depth = deeper(self.deepest(items))?;
        match &mut self.values[dict as usize] {
            (PickleValue::Dict(present), known) if items.len().is_multiple_of(2) => {
                present.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                *known = depth.max(*known);
                Ok(())
            }
            (other, _) => Err(format!("{} keys and values are added to {}", items.len(), other.describe())),
        }
    }

    /// The items of a tuple.
    pub fn tuple(&self, id: ValueId) -> Validated<&[ValueId]> {
        match self.get(id) {
            PickleValue::Tuple(items) => Ok(items),
            other => Err(format!("expected a tuple, found {}", other.describe())),
        }
    }

    /// The string `id`.
    pub fn text(&self, id: ValueId) -> Validated<&'a str> {
        match self.get(id) {
            PickleValue::Text(text) => Ok(text),
            other => Err(format!("expected text, found {}", other.describe())),
        }
    }

    /// The class or function `id`.
    pub fn global(&self, id: ValueId) -> Validated<Global> {
        match self.get(id) {
            PickleValue::Global(global) => Ok(*global),
            other => Err(format!("expected a type or function, found {}", other.describe())),
        }
    }

    /// The non-negative integer `id`.
    pub fn count(&self, id: ValueId) -> Validated<u64> {
        match self.get(id) {
            PickleValue::Integer(number) => {
                u64::try_from(*number).map_err(|_| format!("expected a non-negative integer, found {number}"))
            }
            other => Err(format!("expected a non-negative integer, found {}", other.describe())),
        }
    }

    /// A tuple of non-negative integers, one per axis.
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
    /// Its kind, for messages.
    pub fn describe(&self) -> String {
        match self {
            Self::None => "None".to_owned(),
            Self::Bool(_) => "a bool".to_owned(),
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
