//! What the text of an instruction means: its operation, results and operands.

use crate::arithmetic::{atomic, compare, one, three, two};
use crate::convert::Convert;
use crate::instruction::{Lanes, Operand, Operation, Space};
use crate::memory::{LOCAL, PARAMETER, SHARED};
use crate::program::Decoder;
use half::{bf16, f16};

/// An instruction as written, `ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+16]`.
pub(crate) struct Written<'a> {
    name: &'a str,
    /// `ld`
    head: &'a str,
    /// `global`, `nc`, `v4`, `u32`
    pub modifiers: Vec<&'a str>,
    pub operands: &'a [String],
}

/// Operation, results and operands; or that it is not simulated.
pub(crate) type Decoded = Result<(Operation, Vec<u32>, Vec<Operand>), String>;

impl<'a> Written<'a> {
    /// Of a name and what stands behind it.
    pub fn new(name: &'a str, operands: &'a [String]) -> Self {
        let mut words = name.split('.');
        Self { name, head: words.next().unwrap_or_default(), modifiers: words.collect(), operands }
    }

    pub fn has(&self, word: &str) -> bool {
        self.modifiers.contains(&word)
    }

    /// The last word, a number format.
    fn format(&self) -> &'a str {
        self.modifiers.last().copied().unwrap_or_default()
    }

    pub fn operand(&self, at: usize) -> Result<&'a str, String> {
        self.operands.get(at).map(String::as_str).ok_or_else(|| self.unknown())
    }

    pub fn unknown(&self) -> String {
        format!("{} is not simulated", self.name)
    }

    pub fn known<T>(&self, found: Option<T>) -> Result<T, String> {
        found.ok_or_else(|| self.unknown())
    }
}

impl Decoder {
    /// Operation, results and operands of an instruction.
    pub fn instruction(&mut self, written: &Written) -> Decoded {
        let alone = |operation| Ok((operation, vec![], vec![]));
        match written.head {
            "bra" => {
                self.branch(written.operand(0)?);
                alone(Operation::Nothing)
            }
            "ret" | "exit" => alone(Operation::Exit),
            "trap" => alone(Operation::Trap("trap")),
            "call" => alone(Operation::Trap("calls a function")),
            "bar" | "barrier" => self.of_threads(written),
            "mbarrier" => self.in_memory(written),
            "elect" => self.election(written),
            "setmaxnreg" => self.limit(written),
            "wgmma" => self.of_warpgroup(written),
            "membar" | "fence" | "prefetch" => alone(Operation::Nothing),
            // Arguments of calls, which are not made.
            "st" if written.has("param") => alone(Operation::Nothing),
            "st" | "red" if written.has("async") => Err(written.unknown()),
            "ld" | "st" | "atom" | "red" => self.on_memory(written),
            "cp" if written.has("bulk") => self.box_copy(written),
            "cp" if written.has("commit_group") => alone(Operation::Commit),
            "cp" if written.has("wait_all") => alone(Operation::Wait(0)),
            "cp" if written.has("wait_group") => {
                alone(Operation::Wait(written.known(written.operand(0)?.parse().ok())?))
            }
            "cp" => self.copy(written),
            "mov" | "cvta" | "cvt" => self.moved(written),
            "setp" | "set" => self.comparison(written),
            "shfl" | "ldmatrix" | "mma" => self.together(written),
            _ => self.arithmetic(written),
        }
    }

    /// One result, and all other operands.
    fn simple(&mut self, written: &Written, operation: Operation) -> Decoded {
        let to = vec![self.register(written.operand(0)?)?];
        Ok((operation, to, self.all(written, 1..written.operands.len())?))
    }

    pub(crate) fn all(&mut self, written: &Written, range: std::ops::Range<usize>) -> Result<Vec<Operand>, String> {
        range.map(|at| self.operand(written.operand(at)?)).collect()
    }

    /// `%p1|%p2`
    pub(crate) fn alternatives(&mut self, text: &str) -> Result<Vec<u32>, String> {
        text.split('|').map(|one| self.register(one)).collect()
    }

    fn on_memory(&mut self, written: &Written) -> Decoded {
        let (format, space) = (written.format(), space(&written.modifiers));
        let size = bytes(format)?;
        match written.head {
            "ld" => {
                let (to, from) = (self.registers_of(written.operand(0)?)?, self.address(written.operand(1)?)?);
                Ok((Operation::Load(space, size, format.starts_with('s')), to, from.to_vec()))
            }
            "st" => {
                let mut from = self.address(written.operand(0)?)?.to_vec();
                from.extend(self.operands_of(written.operand(1)?)?);
                Ok((Operation::Store(space, size), vec![], from))
            }
            // The second kind has no result.
            head => {
                let first = usize::from(head == "atom");
                let to = self.register(if first == 1 { written.operand(0)? } else { "_" })?;
                let compute = written.modifiers.iter().find_map(|name| atomic(name, format));
                let mut from = self.address(written.operand(first)?)?.to_vec();
                from.extend(self.all(written, first + 1..written.operands.len())?);
                Ok((Operation::Atomic(space, size, written.known(compute)?), vec![to], from))
            }
        }
    }

    fn copy(&mut self, written: &Written) -> Decoded {
        let mut from = self.address(written.operand(0)?)?.to_vec();
        from.extend(self.address(written.operand(1)?)?);
        let size = written.operand(2)?;
        from.push(self.operand(written.operand(3).unwrap_or(size))?);
        Ok((Operation::CopyAsync(written.known(size.parse().ok())?), vec![], from))
    }

    fn moved(&mut self, written: &Written) -> Decoded {
        let (format, to, from) = (written.format(), written.operand(0)?, written.operand(1)?);
        let joins = |count: usize| Ok::<u32, String>(bytes(format)? * 8 / count.max(1) as u32);
        match written.head {
            "cvta" => {
                let spaces = [("shared", SHARED), ("local", LOCAL), ("param", PARAMETER)];
                let base = spaces.iter().find(|(space, _)| written.has(space)).map_or(0, |one| one.1);
                let base = if written.has("to") { base.wrapping_neg() } else { base };
                let from = vec![self.operand(from)?, Operand::Constant(base)];
                Ok((Operation::Two(written.known(two("add", &[], "u64"))?), vec![self.register(to)?], from))
            }
            "mov" if to.starts_with('{') => {
                let to = self.registers_of(to)?;
                Ok((Operation::Unpack(joins(to.len())?), to, self.operands_of(from)?))
            }
            "mov" if from.starts_with('{') => {
                let from = self.operands_of(from)?;
                Ok((Operation::Pack(joins(from.len())?), vec![self.register(to)?], from))
            }
            "mov" => self.arithmetic(written),
            _ if written.has("f16x2") => self.simple(written, Operation::Two(two_f16)),
            _ if written.has("bf16x2") => self.simple(written, Operation::Two(two_bf16)),
            _ => self.simple(written, Operation::Convert(written.known(Convert::parse(&written.modifiers))?)),
        }
    }

    fn comparison(&mut self, written: &Written) -> Decoded {
        let relation = written.known(written.modifiers.first())?;
        let holds = written.known(compare(relation, written.format()))?;
        if written.head == "setp" {
            let join = ["and", "or", "xor"].into_iter().find(|one| written.has(one));
            let join = join.and_then(|join| two(join, &[], "pred"));
            let to = self.alternatives(written.operand(0)?)?;
            return Ok((Operation::Compare(holds, join), to, self.all(written, 1..written.operands.len())?));
        }
        let value = match written.modifiers[..] {
            [.., "f32", _] => u64::from(1f32.to_bits()),
            [.., "f16", _] => u64::from(f16::ONE.to_bits()),
            [.., "bf16", _] => u64::from(bf16::ONE.to_bits()),
            _ => u64::from(u32::MAX),
        };
        self.simple(written, Operation::Set(holds, value))
    }

    /// What a warp does as one.
    fn together(&mut self, written: &Written) -> Decoded {
        let to = written.operand(0)?;
        match written.head {
            "shfl" => {
                let source = written.known(shuffle(&written.modifiers))?;
                Ok((Operation::Shuffle(source), self.alternatives(to)?, self.all(written, 1..5)?))
            }
            "ldmatrix" => {
                let (to, from) = (self.registers_of(to)?, self.address(written.operand(1)?)?);
                Ok((Operation::LoadMatrices(to.len(), written.has("trans")), to, from.to_vec()))
            }
            _ => {
                let number = format_of_product(&written.modifiers).and_then(number_of_bits);
                let number = written.known(number)?;
                let mut from = Vec::new();
                for at in 1..4 {
                    from.extend(self.operands_of(written.operand(at)?)?);
                }
                Ok((Operation::MultiplyAdd(number), self.registers_of(to)?, from))
            }
        }
    }

    fn arithmetic(&mut self, written: &Written) -> Decoded {
        let (head, modifiers, format) = (written.head, &written.modifiers[..], written.format());
        let operation = match (written.operands.len(), format.strip_suffix("x2")) {
            (4, Some(half)) => three(head, modifiers, half).map(Operation::Halves),
            (_, Some(_)) => None,
            (2, _) => one(head, modifiers, format).map(Operation::One),
            (3, _) => two(head, modifiers, format).map(Operation::Two),
            (4, _) => three(head, modifiers, format).map(Operation::Three),
            (5, _) if head == "bfi" => Some(Operation::Insert(u64::from(bytes(format)? * 8))),
            _ => None,
        };
        self.simple(written, written.known(operation)?)
    }
}

/// Where addresses lie.
pub(crate) fn space(modifiers: &[&str]) -> Space {
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

/// What 16 bits of a format are.
pub(crate) fn number_of_bits(format: &str) -> Option<fn(u16) -> f32> {
    Some(match format {
        "bf16" => |bits| bf16::from_bits(bits).to_f32(),
        "f16" => |bits| f16::from_bits(bits).to_f32(),
        _ => return None,
    })
}

/// The format of the factors of `mma.…f32.bf16.bf16.f32`.
fn format_of_product<'a>(modifiers: &[&'a str]) -> Option<&'a str> {
    match modifiers {
        ["sync", "aligned", "m16n8k16", .., "f32", a, b, "f32"] if a == b => Some(a),
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

fn two_f16(high: &Lanes, low: &Lanes) -> Lanes {
    let half = |bits: u64| u64::from(f16::from_f32(f32::from_bits(bits as u32)).to_bits());
    std::array::from_fn(|i| half(high[i]) << 16 | half(low[i]))
}

fn two_bf16(high: &Lanes, low: &Lanes) -> Lanes {
    let half = |bits: u64| u64::from(bf16::from_f32(f32::from_bits(bits as u32)).to_bits());
    std::array::from_fn(|i| half(high[i]) << 16 | half(low[i]))
}
