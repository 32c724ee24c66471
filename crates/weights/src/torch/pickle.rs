//! [`Pickle`]: what a Python pickle of protocols 2 to 5 builds, as data.
//!
//! A pickle is a program for a stack machine, whose instructions may name any class or function and have it called.
//! Here those of [`Global`] have a meaning and no other has one. The instructions are those of
//! <https://github.com/python/cpython/blob/main/Lib/pickletools.py>; those that `torch.save` never writes are refused.

use super::Validated;
use super::globals::Global;
use super::input::ByteReader;
use super::storage::{TorchStorage, ViewSpec, width};
use super::value::{PickleValue, ValueArena, ValueId};
use std::collections::HashMap;

/// Lists and dicts come a thousand items at a time; a tuple alone can need more.
const MOST_ON_STACK: usize = 100_000;

/// Everything is kept once, though little is asked for again.
const MOST_REMEMBERED: usize = 1 << 21;
/// Whatever makes a tensor looks at no more; what is passed can be long, and passed often.
const MOST_ARGUMENTS: usize = 8;
/// Keys of storages are numbers, or were once addresses.
const LONGEST_KEY: usize = 100;

/// Values of a pickle.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub values: ValueArena<'a>,
    pub storages: Vec<TorchStorage<'a>>,
    /// What all the others are part of.
    pub root: ValueId,
    /// Bytes that it took.
    pub length: usize,
}

impl<'a> Pickle<'a> {
    /// Interprets the pickle that `bytes` begins with.
    pub fn read(bytes: &'a [u8]) -> Validated<Self> {
        let mut machine = PickleMachine::new(bytes);
        loop {
            let at = machine.input.position();
            let place = |reason| format!("byte {at} of the pickle: {reason}");
            match machine.input.byte().map_err(|_| "the pickle is cut short".to_owned())? {
                b'.' => break,
                opcode => machine.step(opcode).map_err(place)?,
            }
        }
        let root = machine.pop()?;
        let length = machine.input.position();
        Ok(Self { values: machine.values, storages: machine.storages, root, length })
    }
}

struct PickleMachine<'a> {
    input: ByteReader<'a>,
    values: ValueArena<'a>,
    storages: Vec<TorchStorage<'a>>,
    keys: HashMap<&'a str, usize>,
    stack: Vec<ValueId>,
    /// Heights of the stack that instructions return to.
    marks: Vec<usize>,
    memo: HashMap<u64, ValueId>,
}

impl<'a> PickleMachine<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            input: ByteReader::new(bytes),
            values: ValueArena::default(),
            storages: Vec::new(),
            keys: HashMap::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        }
    }

    fn step(&mut self, opcode: u8) -> Validated<()> {
        match opcode {
            0x80 => self.protocol(),
            0x95 => self.frame(),
            b'N' => self.push(PickleValue::None),
            0x88 => self.push(PickleValue::Truth(true)),
            0x89 => self.push(PickleValue::Truth(false)),
            b'K' => self.unsigned(1),
            b'M' => self.unsigned(2),
            b'J' => self.integer(4),
            0x8a => self.long(1),
            0x8b => self.long(4),
            b'G' => self.float(),
            0x8c | b'U' => self.text(1),
            b'X' | b'T' => self.text(4),
            0x8d => self.text(8),
            b'C' => self.bytes(1),
            b'B' => self.bytes(4),
            0x8e | 0x96 => self.bytes(8),
            b'}' => self.push(PickleValue::Dict(Vec::new())),
            b']' => self.push(PickleValue::List(Vec::new())),
            b')' => self.push(PickleValue::Tuple(Vec::new())),
            0x8f => self.push(PickleValue::Other("a set")),
            b'(' => self.mark(),
            b't' => self.tuple_from_mark(),
            0x85 => self.tuple(1),
            0x86 => self.tuple(2),
            0x87 => self.tuple(3),
            b'a' => self.append(),
            b'e' | 0x90 => self.appends(),
            0x91 => self.frozen_set(),
            b's' => self.put(),
            b'u' => self.puts(),
            b'q' => self.memorise(1),
            b'r' => self.memorise(4),
            0x94 => self.memorise_next(),
            b'h' => self.recall(1),
            b'j' => self.recall(4),
            b'0' => self.pop().map(drop),
            b'1' => self.pop_mark().map(drop),
            b'c' => self.global(),
            0x93 => self.global_on_stack(),
            b'Q' => self.storage(),
            b'R' | 0x81 => self.reduce(),
            0x92 => self.reduce_with_keywords(),
            b'b' => self.attributes(),
            _ => Err(format!("instruction {opcode:#04x}, which torch.save does not write")),
        }
    }

    fn protocol(&mut self) -> Validated<()> {
        match self.input.byte()? {
            2..=5 => Ok(()),
            other => Err(format!("pickle protocol {other}, expected 2 to 5")),
        }
    }

    fn frame(&mut self) -> Validated<()> {
        let length = self.input.number(8)?;
        self.input.clone().take(length).map(drop)
    }

    fn push(&mut self, value: PickleValue<'a>) -> Validated<()> {
        let id = self.values.add(value)?;
        self.push_id(id)
    }

    fn push_id(&mut self, id: ValueId) -> Validated<()> {
        if self.stack.len() >= MOST_ON_STACK {
            return Err(format!("more than {MOST_ON_STACK} values on the stack"));
        }
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Validated<ValueId> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(id) if self.stack.len() >= floor => Ok(id),
            _ => Err("a value is taken from an empty stack".to_owned()),
        }
    }

    /// The value on top, which stays.
    fn top(&self) -> Validated<ValueId> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(&id) if self.stack.len() > floor => Ok(id),
            _ => Err("a value is asked of an empty stack".to_owned()),
        }
    }

    fn mark(&mut self) -> Validated<()> {
        if self.marks.len() >= MOST_ON_STACK {
            return Err(format!("more than {MOST_ON_STACK} marks"));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn pop_mark(&mut self) -> Validated<Vec<ValueId>> {
        let mark = self.marks.pop().ok_or("no mark is set")?;
        Ok(self.stack.split_off(mark))
    }

    fn unsigned(&mut self, width: u64) -> Validated<()> {
        let number = self.input.number(width)?;
        self.push(PickleValue::Integer(number.into()))
    }

    fn long(&mut self, width: u64) -> Validated<()> {
        let length = self.input.number(width)?;
        self.integer(length)
    }

    /// A number in two's complement; one that no file needs is not kept.
    fn integer(&mut self, length: u64) -> Validated<()> {
        let bytes = self.input.take(length)?;
        if bytes.len() > 16 {
            return self.push(PickleValue::Other("a number"));
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut whole = [if negative { 0xff } else { 0 }; 16];
        whole[..bytes.len()].copy_from_slice(bytes);
        self.push(PickleValue::Integer(i128::from_le_bytes(whole)))
    }

    fn float(&mut self) -> Validated<()> {
        self.input.take(8)?;
        self.push(PickleValue::Other("a number"))
    }

    fn text(&mut self, width: u64) -> Validated<()> {
        let length = self.input.number(width)?;
        let bytes = self.input.take(length)?;
        self.push(std::str::from_utf8(bytes).map_or(PickleValue::Other("bytes"), PickleValue::Text))
    }

    fn bytes(&mut self, width: u64) -> Validated<()> {
        let length = self.input.number(width)?;
        self.input.take(length)?;
        self.push(PickleValue::Other("bytes"))
    }

    fn tuple_from_mark(&mut self) -> Validated<()> {
        let items = self.pop_mark()?;
        self.push(PickleValue::Tuple(items))
    }

    fn tuple(&mut self, length: usize) -> Validated<()> {
        let mut items = (0..length).map(|_| self.pop()).collect::<Validated<Vec<_>>>()?;
        items.reverse();
        self.push(PickleValue::Tuple(items))
    }

    fn append(&mut self) -> Validated<()> {
        let item = self.pop()?;
        self.values.append(self.top()?, &[item])
    }

    fn appends(&mut self) -> Validated<()> {
        let items = self.pop_mark()?;
        self.values.append(self.top()?, &items)
    }

    fn frozen_set(&mut self) -> Validated<()> {
        self.pop_mark()?;
        self.push(PickleValue::Other("a set"))
    }

    fn put(&mut self) -> Validated<()> {
        let (value, key) = (self.pop()?, self.pop()?);
        self.values.put(self.top()?, &[key, value])
    }

    fn puts(&mut self) -> Validated<()> {
        let items = self.pop_mark()?;
        self.values.put(self.top()?, &items)
    }

    fn memorise(&mut self, width: u64) -> Validated<()> {
        let key = self.input.number(width)?;
        self.remember(key)
    }

    fn memorise_next(&mut self) -> Validated<()> {
        self.remember(self.memo.len() as u64)
    }

    fn remember(&mut self, key: u64) -> Validated<()> {
        let id = self.top()?;
        self.memo.insert(key, id);
        if self.memo.len() <= MOST_REMEMBERED {
            Ok(())
        } else {
            Err(format!("more than {MOST_REMEMBERED} things kept"))
        }
    }

    fn recall(&mut self, width: u64) -> Validated<()> {
        let key = self.input.number(width)?;
        let id = *self.memo.get(&key).ok_or_else(|| format!("nothing is remembered under {key}"))?;
        self.push_id(id)
    }

    fn global(&mut self) -> Validated<()> {
        let (module, name) = (self.input.line()?, self.input.line()?);
        self.push(PickleValue::Global(Global::named(module, name)?))
    }

    fn global_on_stack(&mut self) -> Validated<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let global = Global::named(self.values.text(module)?, self.values.text(name)?)?;
        self.push(PickleValue::Global(global))
    }

    fn reduce(&mut self) -> Validated<()> {
        let (arguments, global) = (self.pop()?, self.pop()?);
        let global = self.values.global(global)?;
        let made = self.made(global, arguments)?;
        self.push_id(made)
    }

    fn reduce_with_keywords(&mut self) -> Validated<()> {
        self.pop()?;
        self.reduce()
    }

    /// Attributes hold no tensors: of a state dict they are the versions of its modules.
    fn attributes(&mut self) -> Validated<()> {
        self.pop()?;
        match self.values.get(self.top()?) {
            PickleValue::Dict(_) | PickleValue::Tensor(_) | PickleValue::Other(_) => Ok(()),
            other => Err(format!("attributes are given to {}", other.describe())),
        }
    }
}

/// What globals make of their arguments.
impl<'a> PickleMachine<'a> {
    fn made(&mut self, global: Global, arguments: ValueId) -> Validated<ValueId> {
        let arguments: Vec<ValueId> = self.values.tuple(arguments)?.iter().copied().take(MOST_ARGUMENTS).collect();
        let argument = |index| required(&arguments, index);
        match global {
            Global::Dict => self.dict(&arguments),
            Global::Other(what) => self.values.add(PickleValue::Other(what)),
            Global::Tensor => self.tensor(&arguments, None),
            Global::TensorOf => match self.values.global(argument(6)?)? {
                Global::Dtype(dtype) => self.tensor(&arguments, Some(dtype)),
                other => Err(format!("expected a number format, found {other:?}")),
            },
            Global::First => argument(0),
            Global::Subclass => self.subclass(argument(0)?, argument(2)?),
            Global::Dtype(_) | Global::Storage(_) | Global::Type => Err(format!("{global:?} is called")),
        }
    }

    /// An empty dict, or, as Python 2 writes it, one of a list of pairs.
    fn dict(&mut self, arguments: &[ValueId]) -> Validated<ValueId> {
        let mut pairs = Vec::new();
        if let Some(PickleValue::List(items)) = arguments.first().map(|&id| self.values.get(id)) {
            for &item in items {
                match self.values.get(item) {
                    PickleValue::List(pair) | PickleValue::Tuple(pair) if pair.len() == 2 => {
                        pairs.push((pair[0], pair[1]))
                    }
                    other => return Err(format!("expected a key and a value, found {}", other.describe())),
                }
            }
        }
        self.values.add(PickleValue::Dict(pairs))
    }

    fn subclass(&mut self, maker: ValueId, arguments: ValueId) -> Validated<ValueId> {
        match self.values.global(maker)? {
            maker @ (Global::Tensor | Global::TensorOf | Global::First) => self.made(maker, arguments),
            other => Err(format!("expected what makes a tensor, found {other:?}")),
        }
    }

    /// Arguments: storage, offset, shape, strides, whether it is trained, hooks, and at the end metadata.
    fn tensor(&mut self, arguments: &[ValueId], dtype: Option<crate::Dtype>) -> Validated<ValueId> {
        let metadata = arguments.get(if dtype.is_some() { 7 } else { 6 }).map(|&id| self.values.get(id));
        match metadata {
            None | Some(PickleValue::None) => {}
            Some(PickleValue::Dict(pairs)) if pairs.is_empty() => {}
            Some(other) => {
                let reason = "a tensor that is negated or conjugated when used is not read";
                return Err(format!(
                    "{reason} (its metadata is {}): call resolve_conj().resolve_neg() first",
                    other.describe()
                ));
            }
        }
        let index = match self.values.get(required(arguments, 0)?) {
            PickleValue::Storage(index) => *index,
            other => return Err(format!("expected a storage, found {}", other.describe())),
        };
        let storage = self.storages[index];
        let dtype = dtype.or(storage.dtype).ok_or("a tensor without a number format")?;
        let claim = ViewSpec {
            dtype,
            offset: self.values.count(required(arguments, 1)?)?,
            shape: self.values.counts(required(arguments, 2)?)?,
            strides: self.values.counts(required(arguments, 3)?)?,
        };
        let tensor = claim.of(&storage, index)?;
        self.values.add(PickleValue::Tensor(Box::new(tensor)))
    }

    /// A tuple: the word "storage", its class, key, device and count of elements; once also a view of it.
    fn storage(&mut self) -> Validated<()> {
        let tuple = self.pop()?;
        let parts = self.values.tuple(tuple)?;
        let part = |index| required(parts, index);
        if self.values.text(part(0)?)? != "storage" {
            return Err("a persistent value that is not a storage".to_owned());
        }
        let Global::Storage(dtype) = self.values.global(part(1)?)? else {
            return Err("a storage of a class that is none of torch's".to_owned());
        };
        if parts.get(5).is_some_and(|&view| !matches!(self.values.get(view), PickleValue::None)) {
            return Err("a storage that is a view of another, as PyTorch 0.4 wrote it: save it again".to_owned());
        }
        let (key, count) = (self.values.text(part(2)?)?, self.values.count(part(4)?)?);
        let bytes =
            count.checked_mul(dtype.map_or(1, width)).ok_or_else(|| format!("a storage of {count} elements"))?;
        let index = self.known(TorchStorage { key, dtype, bytes })?;
        self.push(PickleValue::Storage(index))
    }

    /// The number of `storage`: what bears one key must be one thing.
    fn known(&mut self, storage: TorchStorage<'a>) -> Validated<usize> {
        if storage.key.len() > LONGEST_KEY {
            return Err(format!("a storage whose key has {} bytes, more than {LONGEST_KEY}", storage.key.len()));
        }
        let index = *self.keys.entry(storage.key).or_insert(self.storages.len());
        match self.storages.get(index) {
            None => self.storages.push(storage),
            Some(same) if *same == storage => {}
            Some(other) => return Err(format!("storage {:?} is claimed as {storage:?} and {other:?}", storage.key)),
        }
        Ok(index)
    }
}

fn required(arguments: &[ValueId], index: usize) -> Validated<ValueId> {
    let missing = || format!("{} arguments where more than {index} are needed", arguments.len());
    arguments.get(index).copied().ok_or_else(missing)
}
