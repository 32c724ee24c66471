//! `wgmma`: products of a warpgroup, of which each warp computes 16 of the 64 rows. They run asynchronously: until they are
//! waited for, the matrices must not change and the sums are NaN.

use super::mma::{left_matrix, sum_position};
use super::{Block, Warp, require_all_lanes, uniform_value};
use crate::instruction::{Instruction, Lanes, Operand, Operation, WARP_SIZE, WgmmaShape};
use crate::memory::within;
use crate::tensor_map::swizzle_128;
use std::array::from_fn;
use std::collections::VecDeque;

/// The value of accumulators while a product is pending, a NaN.
const POISON: u64 = 0xffff_ffff;
/// The inner dimension of a product.
const DEPTH: usize = 16;

/// The `wgmma`s of a warp.
#[derive(Default)]
pub(crate) struct WgmmaState {
    /// How many were issued.
    pub issued: u64,
    /// Pending ones that are not yet in a group.
    open: Vec<PendingWgmma>,
    groups: VecDeque<Vec<PendingWgmma>>,
    accumulators: Vec<Accumulators>,
}

struct PendingWgmma {
    /// Index of the instruction.
    at: usize,
    /// Where the left and the right matrix are in shared memory.
    descriptors: [u64; 2],
    /// Whether the product is added to the sums or replaces them.
    adds: bool,
    /// The matrices when it was issued.
    operands: WgmmaOperands,
}

/// The left matrix by columns, the right one by rows.
#[derive(PartialEq)]
struct WgmmaOperands {
    left: Vec<u16>,
    right: Vec<u16>,
}

/// Sums of pending products, taken out of their registers.
struct Accumulators {
    registers: Vec<u32>,
    /// By rows.
    values: Vec<f32>,
    /// How many products are pending.
    pending: usize,
}

impl WgmmaState {
    /// `wgmma.commit_group`
    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// The instruction of a pending product.
    pub fn pending(&self) -> Option<usize> {
        self.groups.iter().flatten().chain(&self.open).next().map(|product| product.at)
    }
}

impl Warp {
    /// `wgmma.fence`: products may use registers written so far.
    pub(super) fn fence(&mut self) {
        self.fences += 1;
    }

    /// Whether a register was written since the last fence. One that was never written counts as written at the start.
    fn is_written_since_fence(&self, register: u32) -> bool {
        self.fences_at_write[register as usize] == self.fences
    }

    /// Writes an accumulator, as a product does, without need for a fence.
    fn write_accumulator(&mut self, register: u32, value: Lanes) {
        self.registers[register as usize] = value;
    }

    /// `wgmma.mma_async`: remembers the matrices and poisons the sums.
    pub(super) fn begin_wgmma(
        &mut self,
        block: &Block,
        at: usize,
        active: u32,
        shape: &WgmmaShape,
    ) -> Result<(), String> {
        require_all_lanes(active)?;
        let instruction = &block.program.instructions[at];
        self.require_fence(instruction)?;
        let [.., right, adds] = instruction.from[..] else { return Err("operands are missing".to_owned()) };
        let left = if shape.left_transposed.is_some() { instruction.from[0] } else { right };
        let left = uniform_value(&self.read(block, left), active)?;
        let right = uniform_value(&self.read(block, right), active)?;
        let adds = uniform_value(&self.read(block, adds), active)? != 0;
        let operands = self.wgmma_operands(block, instruction, shape, [left, right])?;
        self.take_accumulators(block, instruction)?;
        self.wgmma.issued += 1;
        self.wgmma.open.push(PendingWgmma { at, descriptors: [left, right], adds, operands });
        Ok(())
    }

    /// `wgmma.wait_group`
    pub(super) fn wait_for_wgmma(&mut self, block: &Block, pending_groups: usize) -> Result<(), String> {
        while self.wgmma.groups.len() > pending_groups {
            for product in self.wgmma.groups.pop_front().unwrap_or_default() {
                self.finish_wgmma(block, &product)?;
            }
        }
        Ok(())
    }

    /// The registers of a product must have been written before the last fence.
    fn require_fence(&self, instruction: &Instruction) -> Result<(), String> {
        // With three operands, the left matrix is in shared memory.
        let in_registers = if instruction.from.len() > 3 { &instruction.from[..4] } else { &[] };
        let register_of = |operand: &Operand| match operand {
            Operand::Register(register) => Some(*register),
            _ => None,
        };
        let left: Vec<u32> = in_registers.iter().filter_map(register_of).collect();
        for (registers, what) in [(&left, "left matrix"), (&instruction.to, "sums")] {
            if let Some(at) = registers.iter().position(|register| self.is_written_since_fence(*register)) {
                return Err(format!("register {at} of the {what} was written since the last wgmma.fence"));
            }
        }
        Ok(())
    }

    fn wgmma_operands(
        &self,
        block: &Block,
        instruction: &Instruction,
        shape: &WgmmaShape,
        [left, right]: [u64; 2],
    ) -> Result<WgmmaOperands, String> {
        let left = match shape.left_transposed {
            Some(transposed) => shared_matrix(&block.shared, left, transposed, self.number % 4 * 16, 16)?,
            None => {
                let registers: Vec<Lanes> =
                    instruction.from[..4].iter().map(|operand| self.read(block, *operand)).collect();
                let rows = left_matrix(&registers);
                (0..DEPTH * 16).map(|at| rows[at % 16][at / 16]).collect()
            }
        };
        let right = shared_matrix(&block.shared, right, shape.right_transposed, 0, shape.columns)?;
        Ok(WgmmaOperands { left, right })
    }

    /// Takes the sums out of their registers, unless another pending product did.
    fn take_accumulators(&mut self, block: &Block, instruction: &Instruction) -> Result<(), String> {
        let registers = &instruction.to;
        if let Some(same) = self.wgmma.accumulators.iter_mut().find(|other| other.registers == *registers) {
            same.pending += 1;
            return Ok(());
        }
        let overlaps = |other: &Accumulators| other.registers.iter().any(|register| registers.contains(register));
        if self.wgmma.accumulators.iter().any(overlaps) {
            return Err("a pending product uses some of these registers in another shape".to_owned());
        }
        let columns = registers.len() * 2;
        let mut values = vec![0.0; 16 * columns];
        for (at, register) in registers.iter().enumerate() {
            for (lane, bits) in self.read(block, Operand::Register(*register)).iter().enumerate() {
                let (row, column) = sum_position(lane, at);
                values[row * columns + column] = f32::from_bits(*bits as u32);
            }
            self.write_accumulator(*register, [POISON; WARP_SIZE]);
        }
        self.wgmma.accumulators.push(Accumulators { registers: registers.clone(), values, pending: 1 });
        Ok(())
    }

    fn finish_wgmma(&mut self, block: &Block, product: &PendingWgmma) -> Result<(), String> {
        let instruction = &block.program.instructions[product.at];
        let Operation::Wgmma(shape) = instruction.operation else { return Ok(()) };
        let operands = self.wgmma_operands(block, instruction, &shape, product.descriptors)?;
        if let Some(changed) = self.changed_operand(block, instruction, product, &operands) {
            return Err(format!("{changed} changed while `{}` was pending", instruction.text));
        }
        let position = self.wgmma.accumulators.iter().position(|sums| sums.registers == instruction.to);
        let position = position.ok_or("the sums of a pending product are missing")?;
        let sums = &mut self.wgmma.accumulators[position];
        sums.pending -= 1;
        add_product(&mut sums.values, &operands, &shape, product.adds);
        if sums.pending == 0 {
            let Accumulators { registers, values, .. } = self.wgmma.accumulators.swap_remove(position);
            for (at, register) in registers.iter().enumerate() {
                self.write_accumulator(*register, accumulator_lanes(&values, shape.columns, at));
            }
        }
        Ok(())
    }

    /// What was written while a product was pending.
    fn changed_operand(
        &self,
        block: &Block,
        instruction: &Instruction,
        product: &PendingWgmma,
        operands: &WgmmaOperands,
    ) -> Option<&'static str> {
        let is_poison = |register: &u32| self.read(block, Operand::Register(*register)) == [POISON; WARP_SIZE];
        if operands.left != product.operands.left {
            Some("the left matrix")
        } else if operands.right != product.operands.right {
            Some("the right matrix")
        } else if !instruction.to.iter().all(is_poison) {
            Some("an accumulator")
        } else {
            None
        }
    }
}

/// A register of the sums.
fn accumulator_lanes(values: &[f32], columns: usize, register: usize) -> Lanes {
    from_fn(|lane| {
        let (row, column) = sum_position(lane, register);
        u64::from(values[row * columns + column].to_bits())
    })
}

fn add_product(sums: &mut [f32], operands: &WgmmaOperands, shape: &WgmmaShape, adds: bool) {
    let sign = if shape.negated { -1.0 } else { 1.0 };
    let right: Vec<f32> = operands.right.iter().map(|bits| (shape.element)(*bits)).collect();
    for (row, sums) in sums.chunks_exact_mut(shape.columns).enumerate() {
        let mut products = vec![0f32; shape.columns];
        for (right, left) in right.chunks_exact(shape.columns).zip(operands.left[row..].iter().step_by(16)) {
            let left = sign * (shape.element)(*left);
            for (sum, right) in products.iter_mut().zip(right) {
                *sum += left * right;
            }
        }
        for (sum, product) in sums.iter_mut().zip(products) {
            *sum = if adds { *sum + product } else { product };
        }
    }
}

/// Reads a matrix that a descriptor points to: rows of a left one or columns of a right one, `count` of them from `first`
/// on, for each step of the depth.
fn shared_matrix(
    shared: &[u8],
    descriptor: u64,
    transposed: bool,
    first: usize,
    count: usize,
) -> Result<Vec<u16>, String> {
    let field = |from: u32| (descriptor >> from & 0x3fff) << 4;
    let start = field(0);
    let leading = field(16);
    let stride = field(32);
    if descriptor >> 62 != 1 {
        return Err("a matrix without the 128-byte swizzle is not simulated".to_owned());
    }
    if descriptor >> 49 & 7 != 0 || start >> 7 & 7 != 0 {
        return Err(format!("the rows of the matrix at {start:#x} do not begin at a multiple of 1024 bytes"));
    }
    let mut elements = vec![0; DEPTH * count];
    // Eight elements at a time are adjacent.
    for at in 0..DEPTH * count / 8 {
        let (outer, k) = if transposed { (at % (count / 8) * 8, at / (count / 8)) } else { (at / 2, at % 2 * 8) };
        let position = (first + outer) as u64;
        let depth = k as u64;
        let offset = if transposed {
            position % 64 * 2 + position / 64 * leading + depth % 8 * 128 + depth / 8 * stride
        } else {
            position % 8 * 128 + position / 8 * stride + depth * 2
        };
        let from = swizzle_128(start + offset);
        let chunk = within(shared.len(), from, 16)
            .ok_or_else(|| format!("the matrix element at {from:#x} is outside of shared memory"))?;
        for (next, bytes) in shared[chunk].chunks_exact(2).enumerate() {
            let at = if transposed { k * count + outer + next } else { (k + next) * count + outer };
            elements[at] = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
    }
    Ok(elements)
}
