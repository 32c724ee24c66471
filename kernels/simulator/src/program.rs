//! [`Program`]: a kernel whose names have become numbers.

use crate::decode::Written;
use crate::instruction::{Instruction, Operand, Operation, Special};
use crate::text::{Kernel, Statement, Variable, number_of, split};
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

/// Names of a kernel, and what was read of it so far.
pub(crate) struct Decoder {
    /// From the innermost to be last.
    scopes: Vec<HashMap<String, Name>>,
    /// Their numbers, and how many there were.
    path: Vec<usize>,
    begun: usize,
    program: Program,
    /// By scope and name.
    labels: HashMap<(usize, String), usize>,
    /// Branches by where they stand, and in which scopes.
    branches: Vec<(usize, String, Vec<usize>)>,
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
        let mut decoder = Decoder::new(outer, program);
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
    fn new(outer: HashMap<String, Name>, program: Program) -> Self {
        let (labels, branches) = (HashMap::new(), Vec::new());
        Self { scopes: vec![outer], path: vec![0], begun: 0, program, labels, branches }
    }

    fn begin_scope(&mut self) {
        self.begun += 1;
        self.path.push(self.begun);
        self.scopes.push(HashMap::new());
    }

    fn end_scope(&mut self) {
        self.path.pop();
        self.scopes.pop();
    }

    fn label(&mut self, name: &str) {
        let scope = self.path.last().copied().unwrap_or_default();
        self.labels.insert((scope, name.to_owned()), self.program.instructions.len());
    }

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
            Statement::Begin => self.begin_scope(),
            Statement::End => self.end_scope(),
            Statement::Label(name) => self.label(name),
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
                let decoded = self.instruction(&Written::new(name, operands));
                let (operation, to, from) = decoded.unwrap_or((Operation::Trap("is not simulated"), vec![], vec![]));
                self.program.instructions.push(Instruction { guard, operation, to, from, text });
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Program, String> {
        for (at, label, path) in &self.branches {
            let found = path.iter().rev().find_map(|scope| self.labels.get(&(*scope, label.clone())));
            let target = found.ok_or_else(|| format!("no label {label}"))?;
            self.program.instructions[*at].operation = Operation::Branch(*target);
        }
        // Whoever falls out of the body ends.
        let end = Instruction { guard: None, operation: Operation::Exit, to: vec![], from: vec![], text: "end".into() };
        self.program.instructions.push(end);
        Ok(self.program)
    }

    /// The instruction that comes next goes to a label.
    pub(crate) fn branch(&mut self, label: &str) {
        self.branches.push((self.program.instructions.len(), label.to_owned(), self.path.clone()));
    }

    fn find(&self, name: &str) -> Option<Name> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name).copied())
    }

    pub(crate) fn register(&mut self, text: &str) -> Result<u32, String> {
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

    pub(crate) fn operand(&mut self, text: &str) -> Result<Operand, String> {
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
    pub(crate) fn address(&mut self, text: &str) -> Result<[Operand; 2], String> {
        let inside = text.trim_start_matches('[').trim_end_matches(']').trim();
        let (base, offset) = inside.split_once('+').unwrap_or((inside, "0"));
        Ok([self.operand(base.trim())?, self.operand(offset.trim())?])
    }

    /// `{a, b}`, or one alone.
    fn several(text: &str) -> Vec<String> {
        text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).map_or_else(|| vec![text.to_owned()], split)
    }

    pub(crate) fn registers_of(&mut self, text: &str) -> Result<Vec<u32>, String> {
        Self::several(text).iter().map(|one| self.register(one)).collect()
    }

    pub(crate) fn operands_of(&mut self, text: &str) -> Result<Vec<Operand>, String> {
        Self::several(text).iter().map(|one| self.operand(one)).collect()
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
