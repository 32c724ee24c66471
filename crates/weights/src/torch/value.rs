//! [`Values`]: everything a pickle builds, side by side in one list.
//!
//! What holds others names them by their numbers: sharing costs nothing, a value may hold itself, and nothing here
//! recurses, however deep the nesting. It knows no opcodes.

use super::Judged;
use super::globals::Global;
use super::storage::Tensor;

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
pub(super) type Id = u32;

/// One thing that a pickle builds.
#[derive(Debug)]
pub(super) enum Value<'a> {
    None,
    Truth(bool),
    Integer(i128),
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function on the list of those that are known.
    Global(Global),
    /// The number of a storage.
    Storage(usize),
    Tensor(Box<Tensor>),
    /// What no tensor needs, by its kind.
    Other(&'static str),
}

/// All values of a pickle.
#[derive(Debug, Default)]
pub(super) struct Values<'a> {
    values: Vec<(Value<'a>, u32)>,
    items: usize,
    tensors: usize,
}

impl<'a> Values<'a> {
    /// Adds one whose contents are here already.
    pub fn add(&mut self, value: Value<'a>) -> Judged<Id> {
        if self.values.len() >= MOST_VALUES {
            return Err(format!("more than {MOST_VALUES} values"));
        }
        let (items, depth) = match &value {
            Value::Tuple(items) | Value::List(items) => (items.len(), self.deepest(items)),
            Value::Dict(pairs) => (pairs.len(), pairs.iter().map(|pair| self.depth(pair.1)).max().unwrap_or(0)),
            _ => (0, 0),
        };
        self.hold(items)?;
        self.tensors += usize::from(matches!(value, Value::Tensor(_)));
        if self.tensors > MOST_TENSORS {
            return Err(format!("more than {MOST_TENSORS} tensors"));
        }
        self.values.push((value, deeper(depth)?));
        Ok((self.values.len() - 1) as Id)
    }

    pub fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id as usize].0
    }

    /// Counts `items` more that something holds.
    fn hold(&mut self, items: usize) -> Judged<()> {
        self.items += items;
        if self.items <= MOST_ITEMS { Ok(()) } else { Err(format!("more than {MOST_ITEMS} items")) }
    }

    /// Adds `items` to the end of a list. Sets are not kept, nor is what is added to them.
    pub fn append(&mut self, list: Id, items: &[Id]) -> Judged<()> {
        self.hold(items.len())?;
        let depth = deeper(self.deepest(items))?;
        match &mut self.values[list as usize] {
            (Value::List(present), known) => {
                present.extend(items);
                *known = depth.max(*known);
                Ok(())
            }
            (Value::Other(_), _) => Ok(()),
            (other, _) => Err(format!("something is appended to {}", other.describe())),
        }
    }

    /// Puts keys and values, in turns, into a dict.
    pub fn put(&mut self, dict: Id, items: &[Id]) -> Judged<()> {
        self.hold(items.len())?;
        let depth = deeper(self.deepest(items))?;
        match &mut self.values[dict as usize] {
            (Value::Dict(present), known) if items.len().is_multiple_of(2) => {
                present.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                *known = depth.max(*known);
                Ok(())
            }
            (other, _) => Err(format!("{} keys and values are put into {}", items.len(), other.describe())),
        }
    }

    /// The items of a tuple.
    pub fn tuple(&self, id: Id) -> Judged<&[Id]> {
        match self.get(id) {
            Value::Tuple(items) => Ok(items),
            other => Err(format!("expected a tuple, found {}", other.describe())),
        }
    }

    pub fn text(&self, id: Id) -> Judged<&'a str> {
        match self.get(id) {
            Value::Text(text) => Ok(text),
            other => Err(format!("expected text, found {}", other.describe())),
        }
    }

    pub fn global(&self, id: Id) -> Judged<Global> {
        match self.get(id) {
            Value::Global(global) => Ok(*global),
            other => Err(format!("expected a type or function, found {}", other.describe())),
        }
    }

    /// A number that counts something.
    pub fn count(&self, id: Id) -> Judged<u64> {
        match self.get(id) {
            Value::Integer(number) => {
                u64::try_from(*number).map_err(|_| format!("expected a number of things, found {number}"))
            }
            other => Err(format!("expected a number of things, found {}", other.describe())),
        }
    }

    /// A tuple of such numbers, one per axis.
    pub fn counts(&self, id: Id) -> Judged<Vec<u64>> {
        match self.tuple(id)? {
            axes if axes.len() <= MOST_AXES => axes.iter().map(|&item| self.count(item)).collect(),
            axes => Err(format!("{} axes, more than the {MOST_AXES} allowed", axes.len())),
        }
    }

    fn depth(&self, id: Id) -> u32 {
        self.values[id as usize].1
    }

    fn deepest(&self, items: &[Id]) -> u32 {
        items.iter().map(|&item| self.depth(item)).max().unwrap_or(0)
    }
}

impl Value<'_> {
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

fn deeper(depth: u32) -> Judged<u32> {
    if depth < DEEPEST { Ok(depth + 1) } else { Err(format!("values nested more than {DEEPEST} deep")) }
}
