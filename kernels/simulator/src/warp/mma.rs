//! `ldmatrix` and `mma`: matrices whose elements are spread over the lanes of a warp.

use super::{Block, Warp, require_all_lanes};
use crate::instruction::{HalfToF32, Instruction, Lanes, Space, WARP_SIZE};
use std::array::from_fn;
use std::ptr::copy_nonoverlapping;

impl Warp {
    /// `ldmatrix`: lane l has the address of row l % 8 of matrix l / 8, and receives two elements of each matrix.
    pub(super) fn load_matrices(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        count: usize,
        transposed: bool,
    ) -> Result<(), String> {
        require_all_lanes(active)?;
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        for matrix in 0..count {
            let rows = self.load_rows(block, matrix, &addresses)?;
            let element =
                |row: usize, column: usize| u64::from(if transposed { rows[column][row] } else { rows[row][column] });
            let value = from_fn(|lane| element(lane / 4, lane % 4 * 2) | element(lane / 4, lane % 4 * 2 + 1) << 16);
            self.write(instruction.to[matrix], active, value);
        }
        Ok(())
    }

    fn load_rows(&mut self, block: &mut Block, matrix: usize, addresses: &Lanes) -> Result<[[u16; 8]; 8], String> {
        let addresses = &addresses[matrix * 8..][..8];
        if block.schedule.pedantic {
            require_distinct_banks(addresses)?;
        }
        let mut rows = [[0u16; 8]; 8];
        for (at, row) in rows.iter_mut().enumerate() {
            let memory = self.host_address(block, Space::Shared, matrix * 8 + at, addresses[at], 16)?;
            self.record_shared_read(block, addresses[at], 16)?;
            // SAFETY: `memory` has 16 bytes.
            unsafe { copy_nonoverlapping(memory, row.as_mut_ptr().cast(), 16) };
        }
        Ok(rows)
    }

    /// `mma.m16n8k16`: four registers of the left matrix, two of the right one, four of the sums.
    pub(super) fn multiply_add(
        &mut self,
        block: &Block,
        instruction: &Instruction,
        active: u32,
        element: HalfToF32,
    ) -> Result<(), String> {
        require_all_lanes(active)?;
        let operands: Vec<Lanes> = instruction.from.iter().map(|operand| self.read(block, *operand)).collect();
        let left = left_matrix(&operands[..4]).map(|row| row.map(element));
        let right = right_matrix(&operands[4..6]).map(|row| row.map(element));
        let products = product(&left, &right);
        for (register, sums) in operands[6..].iter().enumerate() {
            let value = from_fn(|lane| {
                let (row, column) = sum_position(lane, register);
                u64::from((f32::from_bits(sums[lane] as u32) + products[row][column]).to_bits())
            });
            self.write(instruction.to[register], active, value);
        }
        Ok(())
    }
}

/// The eight rows of 16 bytes of a matrix are read at once if they cover all 32 banks of 4 bytes.
fn require_distinct_banks(addresses: &[u64]) -> Result<(), String> {
    let covered = addresses.iter().fold(0u8, |covered, address| covered | 1 << (address / 16 % 8));
    if covered == u8::MAX { Ok(()) } else { Err("bank conflict: rows of a matrix are in the same banks".to_owned()) }
}

/// The left matrix of a product, 16 x 16, from four registers of a warp.
pub(super) fn left_matrix(registers: &[Lanes]) -> [[u16; 16]; 16] {
    let mut left = [[0; 16]; 16];
    for (at, register) in registers.iter().enumerate() {
        for (lane, pair) in register.iter().enumerate() {
            let row = &mut left[lane / 4 + at % 2 * 8][lane % 4 * 2 + at / 2 * 8..];
            row[0] = *pair as u16;
            row[1] = (*pair >> 16) as u16;
        }
    }
    left
}

/// The right matrix, 16 x 8, from two registers.
fn right_matrix(registers: &[Lanes]) -> [[u16; 8]; 16] {
    let mut right = [[0; 8]; 16];
    for (at, register) in registers.iter().enumerate() {
        for lane in 0..WARP_SIZE {
            let row = lane % 4 * 2 + at * 8;
            right[row][lane / 4] = register[lane] as u16;
            right[row + 1][lane / 4] = (register[lane] >> 16) as u16;
        }
    }
    right
}

fn product(left: &[[f32; 16]; 16], right: &[[f32; 8]; 16]) -> [[f32; 8]; 16] {
    let mut products = [[0f32; 8]; 16];
    for (sums, left) in products.iter_mut().zip(left) {
        for (left, right) in left.iter().zip(right) {
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum += left * right;
            }
        }
    }
    products
}

/// Row and column of a lane's sum in the register of this number.
pub(super) fn sum_position(lane: usize, register: usize) -> (usize, usize) {
    (lane / 4 + register / 2 % 2 * 8, register / 4 * 8 + lane % 4 * 2 + register % 2)
}
