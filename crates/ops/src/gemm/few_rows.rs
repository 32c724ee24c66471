//! [`small_product`]: x wᵀ + b of few rows, for which packing the weight would cost more than the product.

use super::{GemmOperands, GemmShape, WeightRows};
use crate::simd::{CpuFeatures, Element, Isa, Real, SimdKernel};
use rayon::prelude::*;

/// Outputs per task.
const BLOCK_OUTPUTS: usize = 32;

/// [`product`](super::product) of few rows, output by output, so that threads divide the weight and each element is read once.
pub(super) fn small_product<E: Element<Work = f32>, W: Element<Work = f32>>(
    operands: GemmOperands<'_, E, W>,
    shape: GemmShape,
    features: CpuFeatures,
) -> Vec<E> {
    let GemmOperands { x, weight, bias } = operands;
    let GemmShape { rows, inputs, outputs } = shape;
    let x: Vec<f32> = x.iter().map(|value| value.load()).collect();
    let mut columns = vec![E::zero(); rows * outputs]; // (outputs, rows)
    columns.par_chunks_mut(BLOCK_OUTPUTS * rows).enumerate().for_each(|(part, out)| {
        let first = part * BLOCK_OUTPUTS;
        let count = out.len() / rows;
        let bias = bias.map(|bias| &bias[first..]);
        match weight {
            WeightRows::Dense(weight) => {
                let weight = &weight[first * inputs..(first + count) * inputs];
                features.run(DotProducts { out, x: &x, weight, bias, rows });
            }
            WeightRows::Quantized(matrix) => {
                let mut weight = vec![0.0; count * inputs];
                matrix.dequantize(first, &mut weight);
                features.run(DotProducts { out, x: &x, weight: &weight, bias, rows });
            }
        }
    });
    if rows == 1 {
        return columns;
    }
    (0..rows).flat_map(|row| columns[row..].iter().step_by(rows).copied()).collect()
}

/// `out[output][row] = bias[output] + Σ x(row, input) · weight(output, input)`.
struct DotProducts<'a, E, W> {
    out: &'a mut [E],
    x: &'a [f32],
    weight: &'a [W],
    bias: Option<&'a [E]>,
    rows: usize,
}

impl<E: Element<Work = f32>, W: Element<Work = f32>> SimdKernel for DotProducts<'_, E, W> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let inputs = self.x.len() / self.rows;
        let outputs = self.out.chunks_exact_mut(self.rows).zip(self.weight.chunks_exact(inputs));
        for (output, (out, weight)) in outputs.enumerate() {
            let bias = self.bias.map_or(0.0, |bias| bias[output].load());
            for (out, x) in out.iter_mut().zip(self.x.chunks_exact(inputs)) {
                *out = E::store(bias + dot::<W, L>(x, weight));
            }
        }
    }
}

/// Accumulators of a dot product: four registers of AVX-512 or eight of AVX2, enough independent sums to cover the
/// latency of multiply-adds, of which two begin per cycle and take four.
const DOT_LANES: usize = 64;

#[inline(always)]
fn dot<E: Element<Work = f32>, L: Isa>(x: &[f32], weight: &[E]) -> f32 {
    let (x_parts, x_rest) = x.as_chunks::<DOT_LANES>();
    let (weight_parts, weight_rest) = weight.as_chunks::<DOT_LANES>();
    let mut sums = [0.0; DOT_LANES];
    for (x, weight) in x_parts.iter().zip(weight_parts) {
        for sum in 0..DOT_LANES {
            sums[sum] = x[sum].times_plus::<L>(weight[sum].load(), sums[sum]);
        }
    }
    let rest = x_rest.iter().zip(weight_rest).fold(0.0, |rest, (x, weight)| x.times_plus::<L>(weight.load(), rest));
    sums.into_iter().fold(rest, |total, sum| total + sum)
}
