//! [`Program`]: a kernel whose names have become numbers.

use crate::arithmetic::{atomic, compare, one, three, two};
use crate::convert::Convert;
use crate::instruction::{Instruction, Operand, Operation, Space, Special};
use crate::memory::{LOCAL, SHARED};
use crate::text::{Kernel, Statement, Variable, number_of, split};
use half::{bf16, f16};
use std::collections::HashMap;

/// A kernel, ready to run.
pub struct Program {
    /// Its entry point.
    pub name: String,
    /// In order.
    pub instructions: Vec<Instruction>,
    /// How many registers a thread has.
    pub registers: usize,
    /// Where dynamic shared memory begins, behind what is declared with a size.
    pub shared_bytes: usize,
    /// Of each thread.
    pub local_bytes: usize,
    /// Where each argument of a launch begins, and its size.
    pub parameters: Vec<(usize, usize)>,
}

#[derive(Clone, Copy)]
enum Name {
    /// Registers `%r0` and on, so many.
    Registers(u32, u32),
    Address(u64),
}

struct Decoder {
    /// From the innermost to be last.
    scopes: Vec<HashMap<String, Name>>,
    program: Program,
    labels: HashMap<String, usize>,
    /// Branches by where they stand.
    branches: Vec<(usize, String)>,
}

impl Program {
    /// Of a kernel and its module's variables, of which those in global memory lie at `globals`.
    ///
    /// # Errors
    /// Says what is not understood. An instruction that is not simulated is no error before it is reached.
    pub fn new(
        name: &str,
        kernel: &Kernel,
        variables: &[Variable],
        globals: &HashMap<String, u64>,
    ) -> Result<Self, String> {
        let program = Self {
            name: name.to_owned(),
            instructions: Vec::new(),
            registers: 0,
            shared_bytes: 0,
            local_bytes: 0,
            parameters: Vec::new(),
        };
        let outer = globals.iter().map(|(name, address)| (name.clone(), Name::Address(*address))).collect();
        let mut decoder = Decoder { scopes: vec![outer], program, labels: HashMap::new(), branches: Vec::new() };
        for variable in variables.iter().filter(|one| one.space == "shared" && one.bytes > 0) {
            decoder.declare(variable);
        }
        for statement in &kernel.statements {
            if let Statement::Directive(text) = statement
                && [".shared", ".local"].iter().any(|space| text.starts_with(space))
                && let Some(variable) = Variable::parse(text)?
            {
                decoder.declare(&variable);
            }
        }
        // Arrays without a size come last.
        for variable in variables.iter().filter(|one| one.space == "shared" && one.bytes == 0) {
            decoder.declare(variable);
        }
        let mut end = 0usize;
        for parameter in &kernel.parameters {
            let begin = end.next_multiple_of(parameter.align);
            end = begin + parameter.bytes;
            decoder.program.parameters.push((begin, parameter.bytes));
            decoder.name(&parameter.name, Name::Address(begin as u64));
        }
        for statement in &kernel.statements {
            decoder.statement(statement)?;
        }
        decoder.finish()
    }

    /// How many bytes the arguments take.
    pub fn parameter_bytes(&self) -> usize {
        self.parameters.last().map_or(0, |(begin, bytes)| begin + bytes)
    }
}

impl Decoder {
    fn name(&mut self, name: &str, meaning: Name) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), meaning);
        }
    }

    /// Gives a variable of shared or local memory its place.
    fn declare(&mut self, variable: &Variable) {
        let end = match variable.space.as_str() {
            "shared" => &mut self.program.shared_bytes,
            "local" => &mut self.program.local_bytes,
            _ => return,
        };
        let begin = end.next_multiple_of(variable.align);
        *end = begin + variable.bytes;
        self.name(&variable.name, Name::Address(begin as u64));
    }

    fn registers(&mut self, count: usize) -> u32 {
        self.program.registers += count;
        (self.program.registers - count) as u32
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), String> {
        match statement {
            Statement::Begin => self.scopes.push(HashMap::new()),
            Statement::End => drop(self.scopes.pop()),
            Statement::Label(name) => drop(self.labels.insert(name.clone(), self.program.instructions.len())),
            Statement::Directive(text) => {
                let Some(declared) = text.strip_prefix(".reg") else { return Ok(()) };
                let (_, names) = declared.trim().split_once(char::is_whitespace).ok_or_else(|| text.clone())?;
                for name in split(names) {
                    let (name, count) = match name.split_once('<') {
                        Some((name, count)) => (name, count.trim_end_matches('>').parse().map_err(|_| text.clone())?),
                        None => (name.as_str(), 1),
                    };
                    let first = self.registers(count);
                    self.name(name, Name::Registers(first, count as u32));
                }
            }
            Statement::Instruction { guard, name, operands } => {
                let text = format!("{name} {}", operands.join(", "));
                let guard = match guard {
                    Some((register, holds)) => Some((self.register(register)?, *holds)),
                    None => None,
                };
                let decoded = self.instruction(name, operands);
                let (operation, to, from) = decoded.unwrap_or((Operation::Trap("is not simulated"), vec![], vec![]));
                self.program.instructions.push(Instruction { guard, operation, to, from, text });
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Program, String> {
        for (at, label) in &self.branches {
            let target = self.labels.get(label).ok_or_else(|| format!("no label {label}"))?;
            self.program.instructions[*at].operation = Operation::Branch(*target);
        }
        // Whoever falls out of the body ends.
        let end = Instruction { guard: None, operation: Operation::Exit, to: vec![], from: vec![], text: "end".into() };
        self.program.instructions.push(end);
        Ok(self.program)
    }

    fn find(&self, name: &str) -> Option<Name> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name).copied())
    }

    fn register(&mut self, text: &str) -> Result<u32, String> {
        if text == "_" {
            return Ok(self.registers(1));
        }
        if let Some(Name::Registers(first, _)) = self.find(text) {
            return Ok(first);
        }
        let digits = text.trim_end_matches(|letter: char| letter.is_ascii_digit()).len();
        match (self.find(&text[..digits]), text[digits..].parse::<u32>()) {
            (Some(Name::Registers(first, count)), Ok(number)) if number < count => Ok(first + number),
            _ => Err(format!("no register {text}")),
        }
    }

    fn operand(&mut self, text: &str) -> Result<Operand, String> {
        if let Some(special) = special(text) {
            return Ok(Operand::Special(special));
        }
        if let Some(number) = number_of(text) {
            return Ok(Operand::Constant(number));
        }
        match self.find(text) {
            Some(Name::Address(address)) => Ok(Operand::Constant(address)),
            _ => self.register(text).map(Operand::Register),
        }
    }

    /// `[base+offset]`: two operands.
    fn address(&mut self, text: &str) -> Result<[Operand; 2], String> {
        let inside = text.trim_start_matches('[').trim_end_matches(']').trim();
        let (base, offset) = inside.split_once('+').unwrap_or((inside, "0"));
        Ok([self.operand(base.trim())?, self.operand(offset.trim())?])
    }

    /// `{a, b}`, or one alone.
    fn several(text: &str) -> Vec<String> {
        text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).map_or_else(|| vec![text.to_owned()], split)
    }

    fn registers_of(&mut self, text: &str) -> Result<Vec<u32>, String> {
        Self::several(text).iter().map(|one| self.register(one)).collect()
    }

    fn operands_of(&mut self, text: &str) -> Result<Vec<Operand>, String> {
        Self::several(text).iter().map(|one| self.operand(one)).collect()
    }

    /// Operation, results and operands of an instruction.
    fn instruction(&mut self, name: &str, operands: &[String]) -> Result<(Operation, Vec<u32>, Vec<Operand>), String> {
        let words: Vec<&str> = name.split('.').collect();
        let (head, modifiers) = (words[0], &words[1..]);
        let format = words.last().copied().unwrap_or_default();
        let has = |word: &str| modifiers.contains(&word);
        let unknown = || format!("{name} is not simulated");
        let operand = |at: usize| operands.get(at).map(String::as_str).ok_or_else(unknown);
        let simple = |decoder: &mut Self, operation| -> Result<_, String> {
            let to = vec![decoder.register(operand(0)?)?];
            let from = operands[1..].iter().map(|one| decoder.operand(one)).collect::<Result<_, _>>()?;
            Ok((operation, to, from))
        };
        let first = operand(0).unwrap_or_default();
        match head {
            "bra" => {
                self.branches.push((self.program.instructions.len(), first.to_owned()));
                Ok((Operation::Nothing, vec![], vec![]))
            }
            "ret" | "exit" => Ok((Operation::Exit, vec![], vec![])),
            "trap" => Ok((Operation::Trap("trap"), vec![], vec![])),
            "call" => Ok((Operation::Trap("calls a function"), vec![], vec![])),
            "bar" | "barrier" => Ok((Operation::Barrier, vec![], vec![])),
            "membar" | "fence" => Ok((Operation::Nothing, vec![], vec![])),
            // Arguments of calls, which are not made.
            "st" if has("param") => Ok((Operation::Nothing, vec![], vec![])),
            "ld" => {
                let from = self.address(operand(1)?)?;
                let to = self.registers_of(first)?;
                Ok((Operation::Load(space(modifiers), bytes(format)?, format.starts_with('s')), to, from.to_vec()))
            }
            "st" => {
                let mut from = self.address(first)?.to_vec();
                from.extend(self.operands_of(operand(1)?)?);
                Ok((Operation::Store(space(modifiers), bytes(format)?), vec![], from))
            }
            "atom" | "red" => {
                let to = if head == "atom" { operands } else { &[&["_".to_owned()], operands].concat()[..] };
                let name = *modifiers.iter().find(|one| atomic(one, format).is_some()).ok_or_else(unknown)?;
                let mut from = self.address(&to[1])?.to_vec();
                for one in &to[2..] {
                    from.push(self.operand(one)?);
                }
                let compute = atomic(name, format).ok_or_else(unknown)?;
                Ok((Operation::Atomic(space(modifiers), bytes(format)?, compute), vec![self.register(&to[0])?], from))
            }
            "cvta" => {
                let base =
                    [("shared", SHARED), ("local", LOCAL)].iter().find(|(space, _)| has(space)).map_or(0, |one| one.1);
                let base = if has("to") { base.wrapping_neg() } else { base };
                let add = two("add", &[], "u64").ok_or_else(unknown)?;
                let from = vec![self.operand(operand(1)?)?, Operand::Constant(base)];
                Ok((Operation::Two(add), vec![self.register(first)?], from))
            }
            "mov" if first.starts_with('{') => {
                let to = self.registers_of(first)?;
                let width = bytes(format)? * 8 / to.len() as u32;
                Ok((Operation::Unpack(width), to, self.operands_of(operand(1)?)?))
            }
            "mov" if operand(1)?.starts_with('{') => {
                let from = self.operands_of(operand(1)?)?;
                let width = bytes(format)? * 8 / from.len() as u32;
                Ok((Operation::Pack(width), vec![self.register(first)?], from))
            }
            "cvt" if has("f16x2") || has("bf16x2") => {
                let join = if has("f16x2") { two_f16 } else { two_bf16 };
                simple(self, Operation::Two(join))
            }
            "cvt" => {
                let convert = Convert::parse(modifiers).ok_or_else(unknown)?;
                simple(self, Operation::Convert(convert))
            }
            "setp" => {
                let holds = compare(modifiers[0], format).ok_or_else(unknown)?;
                let join = ["and", "or", "xor"].into_iter().find(|one| has(one));
                let to = first.split('|').map(|one| self.register(one)).collect::<Result<_, _>>()?;
                let from = operands[1..].iter().map(|one| self.operand(one)).collect::<Result<_, _>>()?;
                Ok((Operation::Compare(holds, join.and_then(|join| two(join, &[], "pred"))), to, from))
            }
            "set" => {
                let holds = compare(modifiers[0], format).ok_or_else(unknown)?;
                let value = match words[words.len() - 2] {
                    "f32" => u64::from(1f32.to_bits()),
                    "f16" => u64::from(f16::ONE.to_bits()),
                    "bf16" => u64::from(bf16::ONE.to_bits()),
                    _ => u64::from(u32::MAX),
                };
                simple(self, Operation::Set(holds, value))
            }
            "bfi" => simple(self, Operation::Insert(u64::from(bytes(format)? * 8))),
            "shfl" => {
                let from = operands[1..5].iter().map(|one| self.operand(one)).collect::<Result<_, _>>()?;
                let to = first.split('|').map(|one| self.register(one)).collect::<Result<_, _>>()?;
                Ok((Operation::Shuffle(shuffle(modifiers).ok_or_else(unknown)?), to, from))
            }
            "cp" if has("commit_group") => Ok((Operation::Commit, vec![], vec![])),
            "cp" if has("wait_group") => Ok((Operation::Wait(first.parse().map_err(|_| unknown())?), vec![], vec![])),
            "cp" if has("wait_all") => Ok((Operation::Wait(0), vec![], vec![])),
            "cp" => {
                let mut from = self.address(first)?.to_vec();
                from.extend(self.address(operand(1)?)?);
                let size = operand(2)?;
                from.push(self.operand(operand(3).unwrap_or(size))?);
                Ok((Operation::CopyAsync(size.parse().map_err(|_| unknown())?), vec![], from))
            }
            "ldmatrix" => {
                let to = self.registers_of(first)?;
                let from = self.address(operand(1)?)?.to_vec();
                Ok((Operation::LoadMatrices(to.len(), has("trans")), to, from))
            }
            "mma" if has("m16n8k16") => {
                let number: fn(u16) -> f32 = match format_of_product(modifiers) {
                    Some("bf16") => |bits| bf16::from_bits(bits).to_f32(),
                    Some("f16") => |bits| f16::from_bits(bits).to_f32(),
                    _ => return Err(unknown()),
                };
                let mut from = Vec::new();
                for at in 1..4 {
                    from.extend(self.operands_of(operand(at)?)?);
                }
                Ok((Operation::MultiplyAdd(number), self.registers_of(first)?, from))
            }
            _ => {
                let half = format.strip_suffix("x2");
                let operation = match operands.len() {
                    4 if half.is_some() => three(head, modifiers, half.unwrap_or_default()).map(Operation::Halves),
                    2 => one(head, modifiers, format).map(Operation::One),
                    3 => two(head, modifiers, format).map(Operation::Two),
                    4 => three(head, modifiers, format).map(Operation::Three),
                    _ => None,
                };
                simple(self, operation.ok_or_else(unknown)?)
            }
        }
    }
}

fn special(text: &str) -> Option<Special> {
    let (name, axis) = text.split_once('.').unwrap_or((text, "x"));
    let axis = ["x", "y", "z"].iter().position(|one| *one == axis)?;
    Some(match name {
        "%tid" => Special::Thread(axis),
        "%ntid" => Special::Threads(axis),
        "%ctaid" => Special::Block(axis),
        "%nctaid" => Special::Blocks(axis),
        "%laneid" => Special::Lane,
        _ => return None,
    })
}

fn space(modifiers: &[&str]) -> Space {
    let find = |name: &str| modifiers.iter().any(|word| word.split("::").next() == Some(name));
    match () {
        () if find("param") => Space::Parameter,
        () if find("shared") => Space::Shared,
        () if find("local") => Space::Local,
        () => Space::Generic,
    }
}

fn bytes(format: &str) -> Result<u32, String> {
    match format.trim_start_matches(|letter: char| letter.is_ascii_alphabetic()).parse::<u32>() {
        Ok(bits) if bits % 8 == 0 => Ok(bits / 8),
        _ => Err(format!("{format} has no size in bytes")),
    }
}

/// The format of the factors of `mma.…f32.bf16.bf16.f32`.
fn format_of_product<'a>(modifiers: &[&'a str]) -> Option<&'a str> {
    match modifiers {
        [.., "f32", a, b, "f32"] if a == b => Some(a),
        _ => None,
    }
}

/// From which lane a lane takes a value: operand and clamp as the manual's `b` and `c`.
fn shuffle(modifiers: &[&str]) -> Option<fn(u32, u32, u32) -> u32> {
    fn within(from: u32, lane: u32, clamp: u32) -> u32 {
        let segment = clamp >> 8 & 31;
        let most = lane & segment | clamp & 31 & !segment;
        if from <= most { from } else { lane }
    }
    Some(match *modifiers.iter().find(|one| ["bfly", "down", "up", "idx"].contains(*one))? {
        "bfly" => |lane, b, clamp| within(lane ^ b & 31, lane, clamp),
        "down" => |lane, b, clamp| within(lane + (b & 31), lane, clamp),
        "idx" => |lane, b, clamp| within(lane & (clamp >> 8) & 31 | b & 31 & !(clamp >> 8), lane, clamp),
        _ => |lane, b, clamp| {
            let least = lane & (clamp >> 8) & 31 | clamp & 31 & !(clamp >> 8);
            lane.checked_sub(b & 31).filter(|from| *from >= least).unwrap_or(lane)
        },
    })
}

fn two_f16(high: &crate::instruction::Lanes, low: &crate::instruction::Lanes) -> crate::instruction::Lanes {
    let half = |bits: u64| u64::from(f16::from_f32(f32::from_bits(bits as u32)).to_bits());
    std::array::from_fn(|i| half(high[i]) << 16 | half(low[i]))
}

fn two_bf16(high: &crate::instruction::Lanes, low: &crate::instruction::Lanes) -> crate::instruction::Lanes {
    let half = |bits: u64| u64::from(bf16::from_f32(f32::from_bits(bits as u32)).to_bits());
    std::array::from_fn(|i| half(high[i]) << 16 | half(low[i]))
}
