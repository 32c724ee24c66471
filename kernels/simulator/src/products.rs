//! [`Products`] of a warpgroup, `wgmma`: each warp has 16 of the 64 rows. They go on by themselves: their factors must stay
//! as they were, and their sums are no numbers, until they are waited for.

use crate::instruction::{Instruction, Lanes, Operand, WARP};
use crate::matrices::{left_factor, place_of_sum, require_all};
use crate::memory::within;
use crate::tensor_map::swizzled;
use crate::warp::{Block, Warp, uniform};
use std::array::from_fn;
use std::collections::VecDeque;

/// What an accumulator is while products are under way.
const POISON: u64 = 0xffff_ffff;
/// How many numbers of each row and column are multiplied.
const DEPTH: usize = 16;

/// What an instruction multiplies: 64 x 16 and 16 x so many.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Of the right factor.
    pub columns: usize,
    /// What 16 bits are as a number.
    pub number: fn(u16) -> f32,
    /// Of the left factor: none if it lies in registers, else whether its columns follow each other in memory.
    pub left_transposed: Option<bool>,
    /// Whether rows of the right factor follow each other there.
    pub right_transposed: bool,
    /// Whether the product is subtracted.
    pub negative: bool,
}

/// Of a warp.
#[derive(Default)]
pub struct Products {
    /// How many were begun.
    pub begun: u64,
    open: Vec<Begun>,
    groups: VecDeque<Vec<Begun>>,
    sums: Vec<Sums>,
}

/// One under way.
struct Begun {
    /// Its instruction.
    at: usize,
    /// Where factors lie in shared memory.
    descriptors: [u64; 2],
    /// Whether it adds to what is there.
    adds: bool,
    /// As they were when it began.
    factors: Factors,
}

/// The left factor column by column, the right one row by row.
#[derive(PartialEq)]
struct Factors {
    left: Vec<u16>,
    right: Vec<u16>,
}

/// Accumulators of products under way.
struct Sums {
    registers: Vec<u32>,
    /// Row by row.
    values: Vec<f32>,
    /// How many products are to be added.
    products: usize,
}

impl Products {
    /// The products begun so far are a group.
    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// The instruction of one under way.
    pub fn under_way(&self) -> Option<usize> {
        self.groups.iter().flatten().chain(&self.open).next().map(|one| one.at)
    }
}

impl Warp {
    /// A product begins: its factors are remembered, its sums are no numbers from now on.
    pub(crate) fn begin_product(
        &mut self,
        block: &Block,
        at: usize,
        active: u32,
        product: &Product,
    ) -> Result<(), String> {
        require_all(active)?;
        let instruction = &block.program.instructions[at];
        self.require_fence(instruction)?;
        let [.., right, scale] = instruction.from[..] else { return Err("operands are missing".to_owned()) };
        let left = if product.left_transposed.is_some() { instruction.from[0] } else { right };
        let [left, right, scale] = [left, right, scale].map(|one| uniform(&self.read(block, one), active));
        let (descriptors, adds) = ([left?, right?], scale? != 0);
        let factors = self.factors(block, instruction, product, descriptors)?;
        self.take_sums(block, instruction)?;
        self.products.begun += 1;
        self.products.open.push(Begun { at, descriptors, adds, factors });
        Ok(())
    }

    /// Waits until so few groups are under way.
    pub(crate) fn await_products(&mut self, block: &Block, groups: usize) -> Result<(), String> {
        while self.products.groups.len() > groups {
            for begun in self.products.groups.pop_front().unwrap_or_default() {
                self.finish(block, &begun)?;
            }
        }
        Ok(())
    }

    /// Registers that a product uses were last written before a fence.
    fn require_fence(&self, instruction: &Instruction) -> Result<(), String> {
        let factors = instruction.from.iter().take_while(|_| instruction.from.len() > 3).take(4);
        let factors =
            factors.filter_map(|one| if let Operand::Register(register) = one { Some(register) } else { None });
        for (registers, what) in
            [(factors.collect(), "left factor"), (instruction.to.iter().collect::<Vec<_>>(), "sums")]
        {
            if let Some(at) = registers.iter().position(|register| self.is_written_since_fence(**register)) {
                return Err(format!("register {at} of the {what} was written without a wgmma.fence since"));
            }
        }
        Ok(())
    }

    fn factors(
        &self,
        block: &Block,
        instruction: &Instruction,
        product: &Product,
        descriptors: [u64; 2],
    ) -> Result<Factors, String> {
        let left = match product.left_transposed {
            Some(transposed) => factor(&block.shared, descriptors[0], transposed, self.number % 4 * 16, 16)?,
            None => {
                let rows =
                    left_factor(&instruction.from[..4].iter().map(|one| self.read(block, *one)).collect::<Vec<_>>());
                (0..DEPTH * 16).map(|at| rows[at % 16][at / 16]).collect()
            }
        };
        let right = factor(&block.shared, descriptors[1], product.right_transposed, 0, product.columns)?;
        Ok(Factors { left, right })
    }

    /// Takes the accumulators out of their registers, if no product under way did.
    fn take_sums(&mut self, block: &Block, instruction: &Instruction) -> Result<(), String> {
        let registers = &instruction.to;
        if let Some(sums) = self.products.sums.iter_mut().find(|sums| sums.registers == *registers) {
            sums.products += 1;
            return Ok(());
        }
        if self.products.sums.iter().any(|sums| sums.registers.iter().any(|one| registers.contains(one))) {
            return Err("products of another shape are under way to some of these registers".to_owned());
        }
        let columns = registers.len() * 2;
        let mut values = vec![0.0; 16 * columns];
        for (at, register) in registers.iter().enumerate() {
            for (lane, bits) in self.read(block, Operand::Register(*register)).iter().enumerate() {
                let (row, column) = place_of_sum(lane, at);
                values[row * columns + column] = f32::from_bits(*bits as u32);
            }
            self.overwrite(*register, [POISON; WARP]);
        }
        self.products.sums.push(Sums { registers: registers.clone(), values, products: 1 });
        Ok(())
    }

    fn finish(&mut self, block: &Block, begun: &Begun) -> Result<(), String> {
        let instruction = &block.program.instructions[begun.at];
        let crate::instruction::Operation::BeginProduct(product) = instruction.operation else { return Ok(()) };
        let wrong = |what: &str| Err(format!("{what} changed while `{}` was under way", instruction.text));
        let factors = self.factors(block, instruction, &product, begun.descriptors)?;
        if factors.left != begun.factors.left {
            return wrong("the left factor");
        }
        if factors.right != begun.factors.right {
            return wrong("the right factor");
        }
        if instruction.to.iter().any(|one| self.read(block, Operand::Register(*one)) != [POISON; WARP]) {
            return wrong("an accumulator");
        }
        let found = self.products.sums.iter().position(|sums| sums.registers == instruction.to);
        let Some(found) = found else { return wrong("the place of sums") };
        let sums = &mut self.products.sums[found];
        sums.products -= 1;
        add(&mut sums.values, &factors, &product, begun.adds);
        if sums.products == 0 {
            let Sums { registers, values, .. } = self.products.sums.swap_remove(found);
            for (at, register) in registers.iter().enumerate() {
                self.overwrite(*register, sums_of(&values, product.columns, at));
            }
        }
        Ok(())
    }
}

/// A register of accumulators.
fn sums_of(values: &[f32], columns: usize, register: usize) -> Lanes {
    from_fn(|lane| {
        let (row, column) = place_of_sum(lane, register);
        u64::from(values[row * columns + column].to_bits())
    })
}

fn add(sums: &mut [f32], factors: &Factors, product: &Product, adds: bool) {
    let sign = if product.negative { -1.0 } else { 1.0 };
    let right: Vec<f32> = factors.right.iter().map(|bits| (product.number)(*bits)).collect();
    for (row, sums) in sums.chunks_exact_mut(product.columns).enumerate() {
        let mut products = vec![0f32; product.columns];
        for (right, left) in right.chunks_exact(product.columns).zip(factors.left[row..].iter().step_by(16)) {
            let left = sign * (product.number)(*left);
            for (sum, right) in products.iter_mut().zip(right) {
                *sum += left * right;
            }
        }
        for (sum, product) in sums.iter_mut().zip(products) {
            *sum = if adds { *sum + product } else { product };
        }
    }
}

/// Rows of a left factor or columns of a right one, `first` and on, from where a descriptor says: `count` numbers for each
/// of the depth.
fn factor(shared: &[u8], descriptor: u64, transposed: bool, first: usize, count: usize) -> Result<Vec<u16>, String> {
    let field = |from: u32| (descriptor >> from & 0x3fff) << 4;
    let (start, leading, stride) = (field(0), field(16), field(32));
    if descriptor >> 62 != 1 {
        return Err("a factor without a swizzle of 128 bytes is not simulated".to_owned());
    }
    if descriptor >> 49 & 7 != 0 || start >> 7 & 7 != 0 {
        return Err(format!("the rows of a factor at {start:#x} begin at no multiple of 1024 bytes"));
    }
    let mut numbers = vec![0; DEPTH * count];
    // Eight numbers at a time lie beside each other.
    for at in 0..DEPTH * count / 8 {
        let (outer, k) = if transposed { (at % (count / 8) * 8, at / (count / 8)) } else { (at / 2, at % 2 * 8) };
        let (place, depth) = ((first + outer) as u64, k as u64);
        let linear = if transposed {
            place % 64 * 2 + place / 64 * leading + depth % 8 * 128 + depth / 8 * stride
        } else {
            place % 8 * 128 + place / 8 * stride + depth * 2
        };
        let from = swizzled(start + linear);
        let piece = within(shared.len(), from, 16)
            .ok_or_else(|| format!("a factor at {from:#x} is outside of shared memory"))?;
        for (next, number) in shared[piece].chunks_exact(2).enumerate() {
            let at = if transposed { k * count + outer + next } else { (k + next) * count + outer };
            numbers[at] = u16::from_le_bytes([number[0], number[1]]);
        }
    }
    Ok(numbers)
}
