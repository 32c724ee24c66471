//! What a warp does as one with matrices spread over its lanes.

use crate::instruction::{Instruction, Lanes, Space, WARP};
use crate::warp::{Block, Warp};
use std::array::from_fn;
use std::ptr::copy_nonoverlapping;

impl Warp {
    /// Lane l has the address of row l % 8 of matrix l / 8; each matrix is spread over the lanes, two numbers for each.
    pub(crate) fn load_matrices(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        active: u32,
        count: usize,
        transposed: bool,
    ) -> Result<(), String> {
        require_all(active)?;
        let addresses = self.addresses(block, instruction.from[0], instruction.from[1]);
        for matrix in 0..count {
            let mut rows = [[0u16; 8]; 8];
            for (at, row) in rows.iter_mut().enumerate() {
                let lane = matrix * 8 + at;
                let memory = self.memory(block, Space::Shared, lane, addresses[lane], 16)?;
                // SAFETY: 16 bytes are there.
                unsafe { copy_nonoverlapping(memory, row.as_mut_ptr().cast(), 16) };
            }
            let number =
                |row: usize, column: usize| u64::from(if transposed { rows[column][row] } else { rows[row][column] });
            let value = from_fn(|lane| number(lane / 4, lane % 4 * 2) | number(lane / 4, lane % 4 * 2 + 1) << 16);
            self.write(instruction.to[matrix], active, value);
        }
        Ok(())
    }

    /// The fragments of `mma.m16n8k16`: four registers of the left factor, two of the right, four sums.
    pub(crate) fn multiply_add(
        &mut self,
        block: &Block,
        instruction: &Instruction,
        active: u32,
        number: fn(u16) -> f32,
    ) -> Result<(), String> {
        require_all(active)?;
        let operands: Vec<Lanes> = instruction.from.iter().map(|one| self.read(block, *one)).collect();
        let [a, b, sums] = [&operands[..4], &operands[4..6], &operands[6..]];
        let part = |word: u64, which: usize| number((word >> (16 * which)) as u16);
        let left = left_factor(a).map(|row| row.map(number));
        let mut right = [[0f32; 8]; 16];
        for lane in 0..WARP {
            let (group, own) = (lane / 4, lane % 4 * 2);
            for (at, word) in b.iter().enumerate() {
                for which in 0..2 {
                    right[own + at * 8 + which][group] = part(word[lane], which);
                }
            }
        }
        let mut products = [[0f32; 8]; 16];
        for (row, left) in products.iter_mut().zip(&left) {
            for (left, right) in left.iter().zip(&right) {
                for (sum, right) in row.iter_mut().zip(right) {
                    *sum += left * right;
                }
            }
        }
        for (at, sum) in sums.iter().enumerate() {
            let value = from_fn(|lane| {
                let (row, column) = place_of_sum(lane, at);
                let product = products[row][column];
                u64::from((f32::from_bits(sum[lane] as u32) + product).to_bits())
            });
            self.write(instruction.to[at], active, value);
        }
        Ok(())
    }
}

/// The left factor of a product, 16 rows of 16, from four registers of a warp.
pub(crate) fn left_factor(words: &[Lanes]) -> [[u16; 16]; 16] {
    let mut left = [[0; 16]; 16];
    for (at, word) in words.iter().enumerate() {
        for (lane, word) in word.iter().enumerate() {
            let row = &mut left[lane / 4 + at % 2 * 8][lane % 4 * 2 + at / 2 * 8..];
            (row[0], row[1]) = (*word as u16, (*word >> 16) as u16);
        }
    }
    left
}

/// Row and column of a lane's sum in the register of this number.
pub(crate) fn place_of_sum(lane: usize, register: usize) -> (usize, usize) {
    (lane / 4 + register / 2 % 2 * 8, register / 4 * 8 + lane % 4 * 2 + register % 2)
}

pub(crate) fn require_all(active: u32) -> Result<(), String> {
    if active == u32::MAX { Ok(()) } else { Err("not all lanes of the warp are here".to_owned()) }
}
