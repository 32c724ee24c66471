//! [`StoreOutputs`]: Aᵀ m A of the products m of each tile, with bias and residual.

use super::{Block, SharedOutput, TILE, combine};
use crate::simd::{Isa, SimdKernel};

/// Aᵀ m A of the products m of each tile, with bias and residual.
pub(super) struct StoreOutputs<'a> {
    /// (points, points, outputs, tiles), whose rows are `step` apart.
    pub products: &'a [f32],
    pub step: usize,
    pub points: usize,
    pub block: &'a Block,
    pub outputs: usize,
    /// Height and width of the output.
    pub size: [usize; 2],
    pub bias: Option<&'a [f32]>,
    /// (outputs, height, width).
    pub residual: Option<&'a [f32]>,
    /// (outputs, height, width).
    pub out: SharedOutput,
}

impl SimdKernel for StoreOutputs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let [height, width] = self.size;
        let columns = self.block.columns.len();
        let first = TILE * self.block.columns.start;
        let count = (TILE * columns).min(width - first);
        let mut sums = vec![0.0; self.points * columns];
        let mut line = vec![0.0; TILE * columns];
        for output in 0..self.outputs {
            let bias = self.bias.map_or(0.0, |bias| bias[output]);
            for (index, tile_row) in self.block.rows.clone().enumerate() {
                for y in (0..TILE).filter(|y| TILE * tile_row + y < height) {
                    self.add_rows(output, index, y, &mut sums);
                    interleave(&sums, columns, bias, &mut line);
                    let start = (output * height + TILE * tile_row + y) * width + first;
                    if let Some(residual) = self.residual {
                        line.iter_mut().zip(&residual[start..start + count]).for_each(|(out, value)| *out += value);
                    }
                    // SAFETY: row and columns lie within the output, and no other block has them.
                    let out = unsafe { std::slice::from_raw_parts_mut(self.out.0.add(start), count) };
                    out.copy_from_slice(&line[..count]);
                }
            }
        }
    }
}

impl StoreOutputs<'_> {
    /// Row `y` of Aᵀ m, for each column of points.
    #[inline(always)]
    fn add_rows(&self, output: usize, index: usize, y: usize, sums: &mut [f32]) {
        let columns = self.block.columns.len();
        let step = self.step;
        for (x, sums) in sums.chunks_exact_mut(columns).enumerate() {
            let row = |point: usize| {
                &self.products[((point * self.points + x) * self.outputs + output) * step + index * columns..]
                    [..columns]
            };
            match (self.points, y) {
                (3, 0) => combine(row(0), row(1), 1.0, sums),
                (3, _) => combine(row(1), row(2), -1.0, sums),
                (_, 0) => combine_three([row(0), row(1), row(2)], 1.0, sums),
                (_, _) => combine_three([row(1), row(2), row(3)], -1.0, sums),
            }
        }
    }
}

/// out = a + sign · (b + c).
#[inline(always)]
fn combine_three([a, b, c]: [&[f32]; 3], sign: f32, out: &mut [f32]) {
    for (((out, a), b), c) in out.iter_mut().zip(a).zip(b).zip(c) {
        *out = a + sign * (b + c);
    }
}

/// The two outputs of each tile, side by side.
#[inline(always)]
fn interleave(sums: &[f32], columns: usize, bias: f32, line: &mut [f32]) {
    let pairs = line.as_chunks_mut::<2>().0;
    let point = |index: usize| &sums[index * columns..][..columns];
    if sums.len() == 3 * columns {
        for (((pair, a), b), c) in pairs.iter_mut().zip(point(0)).zip(point(1)).zip(point(2)) {
            *pair = [a + b + bias, b - c + bias];
        }
    } else {
        let points = point(0).iter().zip(point(1)).zip(point(2)).zip(point(3));
        for (pair, (((a, b), c), d)) in pairs.iter_mut().zip(points) {
            *pair = [a + b + c + bias, b - c - d + bias];
        }
    }
}
