//! [`WinogradLane`]: what a convolution multiplies, f32 or pairs of bf16.

use crate::simd::{Bf16Pair, CpuFeatures, Lane, MatrixProduct, ROW, Strided};
use crate::strided_product::block_product;

pub(super) trait WinogradLane: Lane<Sum = f32> {
    /// Tiles whose transformed inputs lie together, of a block of `tiles`.
    fn strip(tiles: usize) -> usize;

    /// `tiles` filled up to whole strips.
    fn padded(tiles: usize) -> usize {
        tiles.next_multiple_of(Self::strip(tiles))
    }

    /// The product of one point.
    ///
    /// # Shapes
    /// filter (outputs, lanes), x (strips, lanes, tiles of a strip) -> out (outputs, strips · tiles).
    fn multiply(filter: &[Self], x: &[Self], out: &mut [f32], outputs: usize);
}

impl WinogradLane for f32 {
    fn strip(tiles: usize) -> usize {
        tiles
    }

    fn multiply(filter: &[Self], x: &[Self], out: &mut [f32], outputs: usize) {
        block_product(out, [outputs, filter.len() / outputs, out.len() / outputs], filter, x, [0.0, 1.0]);
    }
}

impl WinogradLane for Bf16Pair {
    fn strip(_: usize) -> usize {
        ROW
    }

    fn multiply(filter: &[Self], x: &[Self], out: &mut [f32], outputs: usize) {
        let lanes = filter.len() / outputs;
        let tiles = out.len() / outputs;
        for (index, x) in x.chunks_exact(lanes * ROW).enumerate() {
            let a = Strided { values: filter, row_step: lanes, inner_step: 1 };
            let inner = 0..lanes;
            let product = MatrixProduct { rows: outputs, inner: &[inner], a, b: x, b_step: ROW };
            product.write_to(&mut out[index * ROW..], tiles, CpuFeatures::detect());
        }
    }
}
