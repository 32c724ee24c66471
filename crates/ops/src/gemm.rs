//! [`product`]: x wᵀ + b of bf16 numbers by multiplying pairs, for processors that have an instruction for that. The
//! tensor library's own widens both sides to f32 first. Knows no tensor.

use crate::simd::{Element, Factor, Pair, Product, ROW, Strided};
use half::bf16;
use rayon::prelude::*;

/// Rows of x that one thread takes at a time.
const ROWS: usize = 96;

/// Pairs that are summed before the sums are stored: as many rows of the weight stay in the second cache.
const DEPTH: usize = 2048;

/// Extents of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extents {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
}

/// x wᵀ + b, summed in f32 and rounded once.
///
/// # Shapes
/// x (rows, inputs), weight (outputs, inputs), bias (outputs) -> (rows, outputs).
pub(crate) fn product(x: &[bf16], weight: &[bf16], bias: Option<&[bf16]>, extents: Extents) -> Vec<bf16> {
    let Extents { rows, inputs, outputs } = extents;
    let mut out = vec![bf16::ZERO; rows * outputs];
    if out.is_empty() || inputs == 0 {
        return biased(out, bias, outputs);
    }
    let weight = packed(weight, extents);
    let parts = out.par_chunks_mut(ROWS * outputs).zip(x.par_chunks(ROWS * inputs));
    parts.for_each(|(out, x)| {
        let x = pairs(x, inputs);
        let mut sums = [0.0; ROWS * ROW];
        for (block, weight) in weight.chunks(inputs.div_ceil(2) * ROW).enumerate() {
            let first = block * ROW;
            begin(&mut sums, bias.map(|bias| &bias[first..outputs.min(first + ROW)]));
            multiply(&mut sums, &x, weight, inputs.div_ceil(2));
            for (out, sums) in out.chunks_exact_mut(outputs).zip(sums.chunks_exact(ROW)) {
                out[first..].iter_mut().zip(sums).for_each(|(out, sum)| *out = bf16::store(*sum));
            }
        }
    });
    out
}

fn biased(mut out: Vec<bf16>, bias: Option<&[bf16]>, outputs: usize) -> Vec<bf16> {
    if let Some(bias) = bias.filter(|_| outputs > 0) {
        out.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
    }
    out
}

/// Every row of sums to the bias, or to 0.
fn begin(sums: &mut [f32], bias: Option<&[bf16]>) {
    sums.fill(0.0);
    let Some(bias) = bias else { return };
    for row in sums.chunks_exact_mut(ROW) {
        row.iter_mut().zip(bias).for_each(|(sum, bias)| *sum = bias.load());
    }
}

/// sums[row][lane] += Σ x(row, pair) · weight[pair][lane].
fn multiply(sums: &mut [f32], x: &[Pair], weight: &[Pair], steps: usize) {
    for first in (0..steps).step_by(DEPTH) {
        let a = Strided { values: &x[first..], row_step: steps, inner_step: 1 };
        let inner = 0..DEPTH.min(steps - first);
        Product { rows: x.len() / steps, inner: &[inner], a, b: &weight[first * ROW..], b_step: ROW }.add_to(sums, ROW);
    }
}

/// Rows of numbers as rows of pairs; a last number without a partner is paired with 0.
fn pairs(rows: &[bf16], inputs: usize) -> Vec<Pair> {
    let steps = inputs.div_ceil(2);
    let mut pairs = vec![Pair::default(); rows.len() / inputs * steps];
    for (pairs, row) in pairs.chunks_exact_mut(steps).zip(rows.chunks_exact(inputs)) {
        Pair::along(row, pairs);
    }
    pairs
}

/// The weight as [block of 32 outputs][pair of inputs][output], 0 where a block is wider than what is left.
fn packed(weight: &[bf16], Extents { inputs, outputs, .. }: Extents) -> Vec<Pair> {
    let steps = inputs.div_ceil(2);
    let mut packed = vec![Pair::default(); outputs.div_ceil(ROW) * steps * ROW];
    packed.par_chunks_mut(steps * ROW).zip(weight.par_chunks(ROW * inputs)).for_each(|(packed, weight)| {
        for (lane, row) in pairs(weight, inputs).chunks_exact(steps).enumerate() {
            packed[lane..].iter_mut().step_by(ROW).zip(row).for_each(|(packed, pair)| *packed = *pair);
        }
    });
    packed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<bf16> {
        (0..count).map(|i| bf16::from_f64(((i * 7919 + seed) as f64 * 0.618).sin())).collect()
    }

    #[test]
    fn sums_written_out_are_met() {
        for (rows, inputs, outputs) in [(1, 1, 1), (13, 7, 33), (97, 64, 31), (200, 5000, 40), (3, 0, 2), (0, 4, 4)] {
            let (x, weight, bias) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2), numbers(outputs, 3));
            let got = product(&x, &weight, Some(&bias), Extents { rows, inputs, outputs });
            assert_eq!(got.len(), rows * outputs);
            for (index, got) in got.iter().enumerate() {
                let (x, weight) = (&x[index / outputs * inputs..], &weight[index % outputs * inputs..]);
                let products = x.iter().zip(weight).take(inputs).map(|(a, b)| a.to_f64() * b.to_f64());
                let want = bias[index % outputs].to_f64() + products.sum::<f64>();
                let bound = want.abs() / 250.0 + 1e-6 * inputs as f64;
                assert!((got.to_f64() - want).abs() <= bound, "{rows} {inputs} {outputs}: {got} for {want}");
            }
        }
    }
}
