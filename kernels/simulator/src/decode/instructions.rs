//! The meaning of single instructions: operation, result registers and operands.

use super::Decoder;
use crate::arithmetic::{atomic, binary, compare, ternary, unary};
use crate::convert::Convert;
use crate::instruction::{HalfToF32, Lanes, Operand, Operation, Space};
use crate::memory::{LOCAL, PARAMETER, SHARED};
use half::{bf16, f16};
use std::array::from_fn;
use std::ops::Range;

/// The text of an instruction, `ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+16]`.
pub(super) struct InstructionText<'a> {
    name: &'a str,
    /// `ld`
    opcode: &'a str,
    /// `global`, `nc`, `v4`, `u32`
    pub modifiers: Vec<&'a str>,
    pub operands: &'a [String],
}

/// Operation, results and operands; or a message that the instruction is not simulated.
pub(super) type Decoded = Result<(Operation, Vec<u32>, Vec<Operand>), String>;

/// An instruction without results or operands.
pub(super) fn without_operands(operation: Operation) -> Decoded {
    Ok((operation, vec![], vec![]))
}

impl<'a> InstructionText<'a> {
    /// Splits a name such as `ld.global.u32` at its dots.
    pub fn new(name: &'a str, operands: &'a [String]) -> Self {
        let mut words = name.split('.');
        Self { name, opcode: words.next().unwrap_or_default(), modifiers: words.collect(), operands }
    }

    /// Whether a modifier is present.
    pub fn has(&self, modifier: &str) -> bool {
        self.modifiers.contains(&modifier)
    }

    /// The last modifier, a number format.
    fn format(&self) -> &'a str {
        self.modifiers.last().copied().unwrap_or_default()
    }

    /// The text of an operand.
    pub fn operand(&self, at: usize) -> Result<&'a str, String> {
        self.operands.get(at).map(String::as_str).ok_or_else(|| self.not_simulated())
    }

    /// The message that this instruction is not simulated.
    pub fn not_simulated(&self) -> String {
        format!("{} is not simulated", self.name)
    }

    /// The value, or a message that the instruction is not simulated.
    pub fn require<T>(&self, value: Option<T>) -> Result<T, String> {
        value.ok_or_else(|| self.not_simulated())
    }
}

impl Decoder {
    /// Decodes an instruction.
    pub(super) fn instruction(&mut self, text: &InstructionText) -> Decoded {
        match text.opcode {
            "bra" => {
                self.branch_to(text.operand(0)?);
                without_operands(Operation::Nop)
            }
            "ret" | "exit" => without_operands(Operation::Exit),
            "trap" => without_operands(Operation::Trap("trap")),
            "call" => without_operands(Operation::Trap("calls a function")),
            "bar" | "barrier" => self.thread_barrier(text),
            "mbarrier" => self.mbarrier(text),
            "elect" => self.elect(text),
            "setmaxnreg" => self.register_limit(text),
            "wgmma" => self.wgmma(text),
            "membar" | "fence" | "prefetch" => without_operands(Operation::Nop),
            // Arguments of function calls, which trap anyway.
            "st" if text.has("param") => without_operands(Operation::Nop),
            "st" | "red" if text.has("async") => Err(text.not_simulated()),
            "ld" | "st" | "atom" | "red" => self.memory_access(text),
            "cp" if text.has("bulk") => self.bulk_copy(text),
            "cp" => self.async_copy(text),
            "mov" | "cvta" | "cvt" => self.move_or_convert(text),
            "setp" | "set" => self.comparison(text),
            "shfl" | "ldmatrix" | "mma" => self.warp_wide(text),
            _ => self.arithmetic(text),
        }
    }

    /// An instruction with one result, whose other operands are all inputs.
    fn simple(&mut self, text: &InstructionText, operation: Operation) -> Decoded {
        let to = vec![self.register(text.operand(0)?)?];
        Ok((operation, to, self.operands(text, 1..text.operands.len())?))
    }

    /// Decodes a range of operands.
    pub(super) fn operands(&mut self, text: &InstructionText, range: Range<usize>) -> Result<Vec<Operand>, String> {
        range.map(|at| self.operand(text.operand(at)?)).collect()
    }

    /// The two results of `%p1|%p2`.
    pub(super) fn result_pair(&mut self, text: &str) -> Result<Vec<u32>, String> {
        text.split('|').map(|name| self.register(name)).collect()
    }

    fn memory_access(&mut self, text: &InstructionText) -> Decoded {
        let format = text.format();
        let space = space(&text.modifiers);
        let bytes = bytes_of(format)?;
        match text.opcode {
            "ld" => {
                let to = self.register_list(text.operand(0)?)?;
                let from = self.address(text.operand(1)?)?;
                Ok((Operation::Load { space, bytes, signed: format.starts_with('s') }, to, from.to_vec()))
            }
            "st" => {
                let mut from = self.address(text.operand(0)?)?.to_vec();
                from.extend(self.operand_list(text.operand(1)?)?);
                Ok((Operation::Store { space, bytes }, vec![], from))
            }
            opcode => {
                // `red` is `atom` without a result.
                let first = usize::from(opcode == "atom");
                let to = self.register(if first == 1 { text.operand(0)? } else { "_" })?;
                let update = text.require(text.modifiers.iter().find_map(|name| atomic(name, format)))?;
                let mut from = self.address(text.operand(first)?)?.to_vec();
                from.extend(self.operands(text, first + 1..text.operands.len())?);
                Ok((Operation::Atomic { space, bytes, update }, vec![to], from))
            }
        }
    }

    /// `bar` and `barrier`, for a block or a warp.
    fn thread_barrier(&mut self, text: &InstructionText) -> Decoded {
        let operands = self.operands(text, 0..text.operands.len())?;
        let operation = match text.modifiers.iter().find(|modifier| !matches!(**modifier, "cta" | "aligned")) {
            Some(&"sync") => Operation::Barrier { waits: true },
            Some(&"arrive") => Operation::Barrier { waits: false },
            Some(&"warp") => Operation::WarpSync,
            _ => return Err(text.not_simulated()),
        };
        Ok((operation, vec![], operands))
    }

    /// `cp.async` and its groups.
    fn async_copy(&mut self, text: &InstructionText) -> Decoded {
        if text.has("commit_group") {
            return without_operands(Operation::CopyCommit);
        }
        if text.has("wait_all") {
            return without_operands(Operation::CopyWaitAll);
        }
        if text.has("wait_group") {
            return without_operands(Operation::CopyWait(text.require(text.operand(0)?.parse().ok())?));
        }
        let mut from = self.address(text.operand(0)?)?.to_vec();
        from.extend(self.address(text.operand(1)?)?);
        let size = text.operand(2)?;
        from.push(self.operand(text.operand(3).unwrap_or(size))?);
        Ok((Operation::CopyAsync(text.require(size.parse().ok())?), vec![], from))
    }

    fn move_or_convert(&mut self, text: &InstructionText) -> Decoded {
        let to = text.operand(0)?;
        let from = text.operand(1)?;
        match text.opcode {
            "cvta" => self.address_conversion(text),
            "mov" if to.starts_with('{') => {
                let to = self.register_list(to)?;
                Ok((Operation::Unpack(bits_of_part(text.format(), to.len())?), to, self.operand_list(from)?))
            }
            "mov" if from.starts_with('{') => {
                let from = self.operand_list(from)?;
                let part = bits_of_part(text.format(), from.len())?;
                Ok((Operation::Pack(part), vec![self.register(to)?], from))
            }
            "mov" => self.arithmetic(text),
            _ if text.has("f16x2") => self.simple(text, Operation::Binary(pack_f16x2)),
            _ if text.has("bf16x2") => self.simple(text, Operation::Binary(pack_bf16x2)),
            _ => self.simple(text, Operation::Convert(text.require(Convert::parse(&text.modifiers))?)),
        }
    }

    /// `cvta`: generic addresses differ from those of a state space by a constant.
    fn address_conversion(&mut self, text: &InstructionText) -> Decoded {
        let bases = [("shared", SHARED), ("local", LOCAL), ("param", PARAMETER)];
        let base = bases.iter().find(|(space, _)| text.has(space)).map_or(0, |(_, base)| *base);
        let base = if text.has("to") { base.wrapping_neg() } else { base };
        let to = vec![self.register(text.operand(0)?)?];
        let from = vec![self.operand(text.operand(1)?)?, Operand::Constant(base)];
        Ok((Operation::Binary(text.require(binary("add", &[], "u64"))?), to, from))
    }

    fn comparison(&mut self, text: &InstructionText) -> Decoded {
        let relation = text.require(text.modifiers.first())?;
        let holds = text.require(compare(relation, text.format()))?;
        if text.opcode == "setp" {
            let join = ["and", "or", "xor"].into_iter().find(|name| text.has(name));
            let join = join.and_then(|name| binary(name, &[], "pred"));
            let to = self.result_pair(text.operand(0)?)?;
            return Ok((Operation::Compare(holds, join), to, self.operands(text, 1..text.operands.len())?));
        }
        let value = match text.modifiers[..] {
            [.., "f32", _] => u64::from(1f32.to_bits()),
            [.., "f16", _] => u64::from(f16::ONE.to_bits()),
            [.., "bf16", _] => u64::from(bf16::ONE.to_bits()),
            _ => u64::from(u32::MAX),
        };
        self.simple(text, Operation::Set(holds, value))
    }

    /// Instructions that exchange data between the lanes of a warp.
    fn warp_wide(&mut self, text: &InstructionText) -> Decoded {
        let to = text.operand(0)?;
        match text.opcode {
            "shfl" => {
                let source = text.require(shuffle(&text.modifiers))?;
                Ok((Operation::Shuffle(source), self.result_pair(to)?, self.operands(text, 1..5)?))
            }
            "ldmatrix" => {
                let to = self.register_list(to)?;
                let from = self.address(text.operand(1)?)?;
                let operation = Operation::LoadMatrices { count: to.len(), transposed: text.has("trans") };
                Ok((operation, to, from.to_vec()))
            }
            _ => {
                let element = text.require(mma_format(&text.modifiers).and_then(half_to_f32))?;
                let mut from = Vec::new();
                for at in 1..4 {
                    from.extend(self.operand_list(text.operand(at)?)?);
                }
                Ok((Operation::Mma(element), self.register_list(to)?, from))
            }
        }
    }

    fn arithmetic(&mut self, text: &InstructionText) -> Decoded {
        let opcode = text.opcode;
        let modifiers = &text.modifiers[..];
        let format = text.format();
        let operation = match (text.operands.len(), format.strip_suffix("x2")) {
            (4, Some(half)) => ternary(opcode, modifiers, half).map(Operation::PerHalf),
            (_, Some(_)) => None,
            (2, _) => unary(opcode, modifiers, format).map(Operation::Unary),
            (3, _) => binary(opcode, modifiers, format).map(Operation::Binary),
            (4, _) => ternary(opcode, modifiers, format).map(Operation::Ternary),
            (5, _) if opcode == "bfi" => Some(Operation::BitInsert(u64::from(bytes_of(format)? * 8))),
            _ => None,
        };
        self.simple(text, text.require(operation)?)
    }
}

/// The state space named by an instruction's modifiers.
pub(super) fn space(modifiers: &[&str]) -> Space {
    let names = |space: &str| modifiers.iter().any(|modifier| modifier.split("::").next() == Some(space));
    if names("param") {
        Space::Parameter
    } else if names("shared") {
        Space::Shared
    } else if names("local") {
        Space::Local
    } else {
        Space::Generic
    }
}

fn bytes_of(format: &str) -> Result<u32, String> {
    match format.trim_start_matches(|letter: char| letter.is_ascii_alphabetic()).parse::<u32>() {
        Ok(bits) if bits % 8 == 0 => Ok(bits / 8),
        _ => Err(format!("{format} has no size in bytes")),
    }
}

/// Bits of each part when a value of this format is split into `parts`.
fn bits_of_part(format: &str, parts: usize) -> Result<u32, String> {
    Ok(bytes_of(format)? * 8 / parts.max(1) as u32)
}

/// The conversion of a 16-bit format.
pub(super) fn half_to_f32(format: &str) -> Option<HalfToF32> {
    Some(match format {
        "bf16" => |bits| bf16::from_bits(bits).to_f32(),
        "f16" => |bits| f16::from_bits(bits).to_f32(),
        _ => return None,
    })
}

/// The format of both matrices of `mma.sync.….f32.bf16.bf16.f32`.
fn mma_format<'a>(modifiers: &[&'a str]) -> Option<&'a str> {
    match modifiers {
        ["sync", "aligned", "m16n8k16", .., "f32", a, b, "f32"] if a == b => Some(a),
        _ => None,
    }
}

/// The source lane of `shfl.sync`, from a lane's number and the operands `b` and `c` of the manual.
fn shuffle(modifiers: &[&str]) -> Option<fn(u32, u32, u32) -> u32> {
    fn up_to_last(from: u32, lane: u32, clamp: u32) -> u32 {
        let segment = clamp >> 8 & 31;
        let last = lane & segment | clamp & 31 & !segment;
        if from <= last { from } else { lane }
    }
    let mode = modifiers.iter().find(|modifier| ["bfly", "down", "up", "idx"].contains(*modifier))?;
    Some(match *mode {
        "bfly" => |lane, b, clamp| up_to_last(lane ^ b & 31, lane, clamp),
        "down" => |lane, b, clamp| up_to_last(lane + (b & 31), lane, clamp),
        "idx" => |lane, b, clamp| up_to_last(lane & (clamp >> 8) & 31 | b & 31 & !(clamp >> 8), lane, clamp),
        _ => |lane, b, clamp| {
            let first = lane & (clamp >> 8) & 31 | clamp & 31 & !(clamp >> 8);
            lane.checked_sub(b & 31).filter(|from| *from >= first).unwrap_or(lane)
        },
    })
}

/// `cvt.rn.f16x2.f32`: two f32 as f16, the first one in the upper half.
fn pack_f16x2(high: &Lanes, low: &Lanes) -> Lanes {
    let to_f16 = |bits: u64| u64::from(f16::from_f32(f32::from_bits(bits as u32)).to_bits());
    from_fn(|i| to_f16(high[i]) << 16 | to_f16(low[i]))
}

/// The same as bf16.
fn pack_bf16x2(high: &Lanes, low: &Lanes) -> Lanes {
    let to_bf16 = |bits: u64| u64::from(bf16::from_f32(f32::from_bits(bits as u32)).to_bits());
    from_fn(|i| to_bf16(high[i]) << 16 | to_bf16(low[i]))
}
