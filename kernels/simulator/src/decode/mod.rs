//! Decodes a kernel's PTX into a [`Program`]: names become register numbers and addresses, labels become indices.

mod hopper;
mod instructions;

use crate::instruction::{Instruction, Operand, Operation, SpecialRegister};
use crate::program::Program;
use crate::ptx::{Kernel, Statement, Variable, literal, split_operands};
use instructions::InstructionText;
use std::collections::HashMap;

/// Decodes a kernel. `variables` are its module's, of which those in global memory are at the addresses in `globals`.
///
/// # Errors
/// Says which text could not be decoded. An instruction that is not simulated fails only once it is executed.
pub fn decode(
    name: &str,
    kernel: &Kernel,
    variables: &[Variable],
    globals: &HashMap<String, u64>,
) -> Result<Program, String> {
    let mut decoder = Decoder::new(name, globals);
    let shared = || variables.iter().filter(|variable| variable.space == "shared");
    for variable in shared().filter(|variable| variable.bytes > 0) {
        decoder.declare(variable);
    }
    for statement in &kernel.statements {
        decoder.declare_in_body(statement)?;
    }
    // Dynamic shared memory, an array without a size, begins behind all others.
    for variable in shared().filter(|variable| variable.bytes == 0) {
        decoder.declare(variable);
    }
    decoder.declare_parameters(&kernel.parameters);
    for statement in &kernel.statements {
        decoder.statement(statement)?;
    }
    decoder.finish()
}

/// The meaning of a name.
#[derive(Clone, Copy)]
enum Symbol {
    /// Registers, the first one's number and how many there are.
    Registers(u32, u32),
    /// A variable's or an argument's address.
    Address(u64),
}

/// A branch whose label has not been resolved.
struct PendingBranch {
    /// Index of the branch instruction.
    at: usize,
    label: String,
    /// Numbers of the scopes around it, outermost first.
    scopes: Vec<usize>,
}

/// A program while it is being decoded.
struct Decoder {
    /// Names by scope, the innermost last.
    symbols: Vec<HashMap<String, Symbol>>,
    /// Numbers of the open scopes, the innermost last.
    open_scopes: Vec<usize>,
    /// How many scopes were opened so far.
    scope_count: usize,
    program: Program,
    /// Instruction index by scope and label.
    labels: HashMap<(usize, String), usize>,
    branches: Vec<PendingBranch>,
}

impl Decoder {
    fn new(name: &str, globals: &HashMap<String, u64>) -> Self {
        let globals = globals.iter().map(|(name, address)| (name.clone(), Symbol::Address(*address))).collect();
        Self {
            symbols: vec![globals],
            open_scopes: vec![0],
            scope_count: 0,
            program: Program { name: name.to_owned(), ..Program::default() },
            labels: HashMap::new(),
            branches: Vec::new(),
        }
    }

    fn open_scope(&mut self) {
        self.scope_count += 1;
        self.open_scopes.push(self.scope_count);
        self.symbols.push(HashMap::new());
    }

    fn close_scope(&mut self) {
        self.open_scopes.pop();
        self.symbols.pop();
    }

    fn define_label(&mut self, name: &str) {
        let scope = self.open_scopes.last().copied().unwrap_or_default();
        self.labels.insert((scope, name.to_owned()), self.program.instructions.len());
    }

    fn define(&mut self, name: &str, symbol: Symbol) {
        if let Some(scope) = self.symbols.last_mut() {
            scope.insert(name.to_owned(), symbol);
        }
    }

    /// Assigns an address to a variable in shared or local memory.
    fn declare(&mut self, variable: &Variable) {
        let end = match variable.space.as_str() {
            "shared" => &mut self.program.shared_bytes,
            "local" => &mut self.program.local_bytes,
            _ => return,
        };
        let begin = end.next_multiple_of(variable.align);
        *end = begin + variable.bytes;
        self.define(&variable.name, Symbol::Address(begin as u64));
    }

    /// Declares the variable of a `.shared` or `.local` directive within a kernel.
    fn declare_in_body(&mut self, statement: &Statement) -> Result<(), String> {
        if let Statement::Directive(text) = statement
            && [".shared", ".local"].iter().any(|space| text.starts_with(space))
            && let Some(variable) = Variable::parse(text)?
        {
            self.declare(&variable);
        }
        Ok(())
    }

    fn declare_parameters(&mut self, parameters: &[Variable]) {
        let mut end = 0usize;
        for parameter in parameters {
            let begin = end.next_multiple_of(parameter.align);
            end = begin + parameter.bytes;
            self.program.parameters.push((begin, parameter.bytes));
            self.define(&parameter.name, Symbol::Address(begin as u64));
        }
    }

    fn allocate_registers(&mut self, count: usize) -> u32 {
        self.program.registers += count;
        (self.program.registers - count) as u32
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), String> {
        match statement {
            Statement::OpenScope => self.open_scope(),
            Statement::CloseScope => self.close_scope(),
            Statement::Label(name) => self.define_label(name),
            Statement::Directive(text) => self.declare_registers(text)?,
            Statement::Instruction { guard, name, operands } => {
                let text = format!("{name} {}", operands.join(", "));
                let guard = match guard {
                    Some((register, value)) => Some((self.register(register)?, *value)),
                    None => None,
                };
                let decoded = self.instruction(&InstructionText::new(name, operands));
                let (operation, to, from) = decoded.unwrap_or((Operation::Trap("is not simulated"), vec![], vec![]));
                self.program.instructions.push(Instruction { guard, operation, to, from, text });
            }
        }
        Ok(())
    }

    /// `.reg .b32 %r<12>`
    fn declare_registers(&mut self, directive: &str) -> Result<(), String> {
        let Some(declared) = directive.strip_prefix(".reg") else { return Ok(()) };
        let (_, names) = declared.trim().split_once(char::is_whitespace).ok_or(directive)?;
        for name in split_operands(names) {
            let (name, count) = match name.split_once('<') {
                Some((name, count)) => (name, count.trim_end_matches('>').parse().map_err(|_| directive)?),
                None => (name.as_str(), 1),
            };
            let first = self.allocate_registers(count);
            self.define(name, Symbol::Registers(first, count as u32));
        }
        Ok(())
    }

    /// Resolves branches, now that all labels are known.
    fn finish(mut self) -> Result<Program, String> {
        for PendingBranch { at, label, scopes } in &self.branches {
            let found = scopes.iter().rev().find_map(|scope| self.labels.get(&(*scope, label.clone())));
            let target = found.ok_or_else(|| format!("no label {label}"))?;
            self.program.instructions[*at].operation = Operation::Branch(*target);
        }
        // A body without a final `ret` ends here.
        let end = Instruction { guard: None, operation: Operation::Exit, to: vec![], from: vec![], text: "end".into() };
        self.program.instructions.push(end);
        Ok(self.program)
    }

    /// Notes that the next instruction is a branch to a label.
    fn branch_to(&mut self, label: &str) {
        let at = self.program.instructions.len();
        self.branches.push(PendingBranch { at, label: label.to_owned(), scopes: self.open_scopes.clone() });
    }

    fn find(&self, name: &str) -> Option<Symbol> {
        self.symbols.iter().rev().find_map(|scope| scope.get(name).copied())
    }

    fn register(&mut self, text: &str) -> Result<u32, String> {
        if text == "_" {
            return Ok(self.allocate_registers(1));
        }
        if let Some(Symbol::Registers(first, _)) = self.find(text) {
            return Ok(first);
        }
        let prefix_length = text.trim_end_matches(|letter: char| letter.is_ascii_digit()).len();
        let (prefix, number) = text.split_at(prefix_length);
        match (self.find(prefix), number.parse::<u32>()) {
            (Some(Symbol::Registers(first, count)), Ok(number)) if number < count => Ok(first + number),
            _ => Err(format!("no register {text}")),
        }
    }

    fn operand(&mut self, text: &str) -> Result<Operand, String> {
        if let Some(register) = special_register(text) {
            return Ok(Operand::Special(register));
        }
        if let Some(value) = literal(text) {
            return Ok(Operand::Constant(value));
        }
        match self.find(text) {
            Some(Symbol::Address(address)) => Ok(Operand::Constant(address)),
            _ => self.register(text).map(Operand::Register),
        }
    }

    /// `[base+offset]` as two operands.
    fn address(&mut self, text: &str) -> Result<[Operand; 2], String> {
        let inner = text.trim_start_matches('[').trim_end_matches(']').trim();
        let (base, offset) = inner.split_once('+').unwrap_or((inner, "0"));
        Ok([self.operand(base.trim())?, self.operand(offset.trim())?])
    }

    /// The registers of `{%r1, %r2}`, or of a single one without braces.
    fn register_list(&mut self, text: &str) -> Result<Vec<u32>, String> {
        list_items(text).iter().map(|item| self.register(item)).collect()
    }

    /// The operands of `{%r1, 2}`, or a single one without braces.
    fn operand_list(&mut self, text: &str) -> Result<Vec<Operand>, String> {
        list_items(text).iter().map(|item| self.operand(item)).collect()
    }
}

fn list_items(text: &str) -> Vec<String> {
    let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}'));
    inner.map_or_else(|| vec![text.to_owned()], split_operands)
}

fn special_register(text: &str) -> Option<SpecialRegister> {
    let (name, axis) = text.split_once('.').unwrap_or((text, "x"));
    let axis = ["x", "y", "z"].iter().position(|letter| *letter == axis)?;
    Some(match name {
        "%tid" => SpecialRegister::Tid(axis),
        "%ntid" => SpecialRegister::Ntid(axis),
        "%ctaid" => SpecialRegister::Ctaid(axis),
        "%nctaid" => SpecialRegister::Nctaid(axis),
        "%laneid" => SpecialRegister::LaneId,
        _ => return None,
    })
}
