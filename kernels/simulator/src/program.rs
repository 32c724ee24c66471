//! [`Program`]: a decoded kernel.

use crate::instruction::Instruction;

/// A kernel, ready to run.
#[derive(Default)]
pub struct Program {
    /// Name of the entry point.
    pub name: String,
    /// The body.
    pub instructions: Vec<Instruction>,
    /// Registers of a thread.
    pub registers: usize,
    /// Statically declared shared memory; dynamic shared memory begins behind it.
    pub shared_bytes: usize,
    /// Local memory of a thread.
    pub local_bytes: usize,
    /// Offset and size of each kernel argument.
    pub parameters: Vec<(usize, usize)>,
}

impl Program {
    /// Size of all arguments together.
    pub fn parameter_bytes(&self) -> usize {
        self.parameters.last().map_or(0, |(begin, bytes)| begin + bytes)
    }
}
