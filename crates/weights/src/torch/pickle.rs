//! [`Pickle`]: what a Python pickle of protocols 2 to 5 builds, as data.
//!
//! A pickle is a program for a stack machine; its instructions may name any class or function and call it. Here only
//! the names of [`Global`] have a meaning, and nothing is called. The instructions are those of
//! <https://github.com/python/cpython/blob/main/Lib/pickletools.py>; those that `torch.save` never writes are refused.

use super::Validated;
use super::globals::Global;
use super::input::ByteReader;
use super::storage::{TorchStorage, ViewSpec, width};
use super::value::{PickleValue, ValueArena, ValueId};
use std::collections::HashMap;

/// Python writes lists and dicts a thousand items at a time; only a long tuple needs more.
const MOST_ON_STACK: usize = 100_000;
/// Python memorises every value, though few are used again; as many as there may be values.
const MOST_MEMORISED: usize = 1 << 21;
/// Arguments that are copied for a call: no function here uses more, and a long tuple may be passed a million times.
const MOST_ARGUMENTS: usize = 8;
/// Keys of storages are numbers; old versions used memory addresses.
const LONGEST_KEY: usize = 100;

/// Values of a pickle.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub values: ValueArena<'a>,
    pub storages: Vec<TorchStorage<'a>>,
    /// The value that the pickle returns.
    pub root: ValueId,
    /// Bytes of the pickle.
    pub length: usize,
}

impl<'a> Pickle<'a> {
    /// Parses the pickle that `bytes` begins with.
    pub fn read(bytes: &'a [u8]) -> Validated<Self> {
        let mut machine = PickleMachine::new(bytes);
        loop {
            let at = machine.input.position();
            let with_position = |reason| format!("byte {at} of the pickle: {reason}");
            match machine.input.byte().map_err(|_| "the pickle is cut short".to_owned())? {
                b'.' => break,
                opcode => machine.step(opcode).map_err(with_position)?,
            }
        }
        let root = machine.pop()?;
        let length = machine.input.position();
        Ok(Self { values: machine.values, storages: machine.storages, root, length })
    }
}

/// The state of the stack machine.
struct PickleMachine<'a> {
    input: ByteReader<'a>,
    values: ValueArena<'a>,
    storages: Vec<TorchStorage<'a>>,
    /// Indices of the storages by key.
    keys: HashMap<&'a str, usize>,
    stack: Vec<ValueId>,
    /// Heights of the stack at the MARK instructions that are still open.
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
            0x88 => self.push(PickleValue::Bool(true)),
            0x89 => self.push(PickleValue::Bool(false)),
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
            _ => Err("a value is popped from an empty stack".to_owned()),
        }
    }

    /// The value on top of the stack, without popping it.
    fn top(&self) -> Validated<ValueId> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(&id) if self.stack.len() > floor => Ok(id),
            _ => Err("a value is read from an empty stack".to_owned()),
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

    /// A number in two's complement. Numbers of more than 16 bytes occur in no real file, and their value is dropped.
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
        let value = self.pop()?;
        let key = self.pop()?;
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
        if self.memo.len() <= MOST_MEMORISED { Ok(()) } else { Err(format!("more than {MOST_MEMORISED} memo entries")) }
    }

    fn recall(&mut self, width: u64) -> Validated<()> {
        let key = self.input.number(width)?;
        let id = *self.memo.get(&key).ok_or_else(|| format!("the memo has no entry {key}"))?;
        self.push_id(id)
    }

    fn global(&mut self) -> Validated<()> {
        let module = self.input.line()?;
        let name = self.input.line()?;
        self.push(PickleValue::Global(Global::named(module, name)?))
    }

    fn global_on_stack(&mut self) -> Validated<()> {
        let name = self.pop()?;
        let module = self.pop()?;
        let global = Global::named(self.values.text(module)?, self.values.text(name)?)?;
        self.push(PickleValue::Global(global))
    }

    fn reduce(&mut self) -> Validated<()> {
        let arguments = self.pop()?;
        let callee = self.pop()?;
        let global = self.values.global(callee)?;
        let result = self.call(global, arguments)?;
        self.push_id(result)
    }

    fn reduce_with_keywords(&mut self) -> Validated<()> {
        self.pop()?;
        self.reduce()
    }

    /// BUILD sets attributes, which are dropped: those of a state dict are the versions of its modules.
    fn attributes(&mut self) -> Validated<()> {
        self.pop()?;
        match self.values.get(self.top()?) {
            PickleValue::Dict(_) | PickleValue::Tensor(_) | PickleValue::Other(_) => Ok(()),
            other => Err(format!("attributes are set on {}", other.describe())),
        }
    }
}

/// What the known classes and functions return.
impl<'a> PickleMachine<'a> {
    fn call(&mut self, global: Global, arguments: ValueId) -> Validated<ValueId> {
        let arguments: Vec<ValueId> = self.values.tuple(arguments)?.iter().copied().take(MOST_ARGUMENTS).collect();
        let argument = |index| required(&arguments, index);
        match global {
            Global::Dict => self.dict(&arguments),
            Global::Other(what) => self.values.add(PickleValue::Other(what)),
            Global::Tensor => self.tensor(&arguments, None),
            Global::TensorOf => match self.values.global(argument(6)?)? {
                Global::Dtype(dtype) => self.tensor(&arguments, Some(dtype)),
                other => Err(format!("expected a dtype, found {other:?}")),
            },
            Global::First => argument(0),
            Global::Subclass => self.subclass(argument(0)?, argument(2)?),
            Global::Dtype(_) | Global::Storage(_) | Global::Type => Err(format!("{global:?} is called")),
        }
    }

    /// `OrderedDict()`, or with a list of pairs as Python 2 writes it.
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

    /// `_rebuild_from_type_v2(function, type, arguments, state)`.
    fn subclass(&mut self, function: ValueId, arguments: ValueId) -> Validated<ValueId> {
        match self.values.global(function)? {
            function @ (Global::Tensor | Global::TensorOf | Global::First) => self.call(function, arguments),
            other => Err(format!("expected a function that makes a tensor, found {other:?}")),
        }
    }

    /// `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata)`; version 3 has the dtype
    /// before the metadata.
    fn tensor(&mut self, arguments: &[ValueId], dtype: Option<crate::Dtype>) -> Validated<ValueId> {
        let metadata = arguments.get(if dtype.is_some() { 7 } else { 6 });
        self.check_metadata(metadata.map(|&id| self.values.get(id)))?;
        let index = match self.values.get(required(arguments, 0)?) {
            PickleValue::Storage(index) => *index,
            other => return Err(format!("expected a storage, found {}", other.describe())),
        };
        let storage = self.storages[index];
        let dtype = dtype.or(storage.dtype).ok_or("a tensor without a dtype")?;
        let spec = ViewSpec {
            dtype,
            offset: self.values.count(required(arguments, 1)?)?,
            shape: self.values.counts(required(arguments, 2)?)?,
            strides: self.values.counts(required(arguments, 3)?)?,
        };
        let tensor = spec.of(&storage, index)?;
        self.values.add(PickleValue::Tensor(Box::new(tensor)))
    }

    /// PyTorch marks lazily negated or conjugated tensors in their metadata; the stored values are not theirs.
    fn check_metadata(&self, metadata: Option<&PickleValue>) -> Validated<()> {
        match metadata {
            None | Some(PickleValue::None) => Ok(()),
            Some(PickleValue::Dict(pairs)) if pairs.is_empty() => Ok(()),
            Some(other) => {
                let found = other.describe();
                let reason = "lazily negated or conjugated tensors are not supported";
                Err(format!("{reason} (its metadata is {found}): call resolve_conj().resolve_neg() before saving"))
            }
        }
    }

    /// The persistent id of a storage: a tuple of "storage", its class, key, device and number of elements, and in
    /// PyTorch 0.4 a view.
    fn storage(&mut self) -> Validated<()> {
        let tuple = self.pop()?;
        let items = self.values.tuple(tuple)?;
        let item = |index| required(items, index);
        if self.values.text(item(0)?)? != "storage" {
            return Err("a persistent value that is not a storage".to_owned());
        }
        let Global::Storage(dtype) = self.values.global(item(1)?)? else {
            return Err("a storage whose class is not one of torch's".to_owned());
        };
        if items.get(5).is_some_and(|&view| !matches!(self.values.get(view), PickleValue::None)) {
            return Err("a storage that is a view of another, as PyTorch 0.4 wrote it: save it again".to_owned());
        }
        let key = self.values.text(item(2)?)?;
        let count = self.values.count(item(4)?)?;
        let bytes =
            count.checked_mul(dtype.map_or(1, width)).ok_or_else(|| format!("a storage of {count} elements"))?;
        let index = self.storage_index(TorchStorage { key, dtype, bytes })?;
        self.push(PickleValue::Storage(index))
    }

    /// The index of `storage`. Storages of the same key must be equal.
    fn storage_index(&mut self, storage: TorchStorage<'a>) -> Validated<usize> {
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
