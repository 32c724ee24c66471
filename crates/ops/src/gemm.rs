//! [`product`]: x wᵀ + b and x w of bf16 numbers, by multiplying pairs where the processor has an instruction for that. The
//! tensor library's own widens both sides to f32 first. Knows no tensor.

use crate::simd::{Element, Factor, Instructions, Level, Pair, Product, ROW, Real, Strided, Task};
use half::bf16;
use rayon::prelude::*;

/// Rows of x that one thread takes at a time, at most.
const ROWS: usize = 96;

/// Rows that the product computes together.
const PANEL: usize = 12;

/// Pairs that are summed before the sums are stored: as many rows of the weight stay in the second cache.
const DEPTH: usize = 2048;

/// Rows of x up to which the weight is read as it stands: packing it would cost more than the product.
const FEW: usize = 8;

/// Outputs that one thread takes at a time where rows are few.
const OUTPUTS: usize = 32;

/// Extents of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extents {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
}

impl Extents {
    /// Whether [`product`] is faster than widening both sides.
    pub fn suit(self, instructions: Instructions) -> bool {
        self.rows <= FEW || instructions.multiply_pairs()
    }
}

/// The numbers of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sides<'a> {
    pub x: &'a [bf16],
    pub weight: &'a [bf16],
    pub bias: Option<&'a [bf16]>,
}

/// x wᵀ + b, summed in f32 and rounded once.
///
/// # Shapes
/// x (rows, inputs), weight (outputs, inputs), bias (outputs) -> (rows, outputs).
pub(crate) fn product(sides: Sides<'_>, extents: Extents, instructions: Instructions) -> Vec<bf16> {
    let Extents { rows, inputs, outputs } = extents;
    if rows == 0 || outputs == 0 || inputs == 0 {
        return biased(vec![bf16::ZERO; rows * outputs], sides.bias, outputs);
    }
    if rows <= FEW { of_few(sides, extents, instructions) } else { of_many(sides, extents, instructions) }
}

/// x w, summed in f32 and rounded once: the gradient of x, where x is that of the product.
///
/// # Shapes
/// x (rows, inputs), weight (inputs, outputs) -> (rows, outputs).
pub(crate) fn product_by_columns(
    x: &[bf16],
    weight: &[bf16],
    extents: Extents,
    instructions: Instructions,
) -> Vec<bf16> {
    if extents.rows == 0 || extents.outputs == 0 || extents.inputs == 0 {
        return vec![bf16::ZERO; extents.rows * extents.outputs];
    }
    by_packed((x, &packed_columns(weight, extents)), None, extents, instructions)
}

fn of_many(Sides { x, weight, bias }: Sides<'_>, extents: Extents, instructions: Instructions) -> Vec<bf16> {
    by_packed((x, &packed(weight, extents)), bias, extents, instructions)
}

/// x by a packed weight.
fn by_packed(
    (x, weight): (&[bf16], &[Pair]),
    bias: Option<&[bf16]>,
    extents: Extents,
    instructions: Instructions,
) -> Vec<bf16> {
    let Extents { rows, inputs, outputs } = extents;
    let mut out = vec![bf16::ZERO; rows * outputs];
    // Fewer where threads would have none otherwise; each sum is the same however rows are shared out.
    let at_a_time = rows.div_ceil(rayon::current_num_threads()).next_multiple_of(PANEL).min(ROWS);
    let parts = out.par_chunks_mut(at_a_time * outputs).zip(x.par_chunks(at_a_time * inputs));
    parts.for_each(|(out, x)| {
        let x = pairs(x, inputs);
        let mut sums = [0.0; ROWS * ROW];
        for (block, weight) in weight.chunks(inputs.div_ceil(2) * ROW).enumerate() {
            let first = block * ROW;
            begin(&mut sums, bias.map(|bias| &bias[first..outputs.min(first + ROW)]));
            multiply(&mut sums, &x, weight, instructions);
            for (out, sums) in out.chunks_exact_mut(outputs).zip(sums.chunks_exact(ROW)) {
                out[first..].iter_mut().zip(sums).for_each(|(out, sum)| *out = bf16::store(*sum));
            }
        }
    });
    out
}

/// Output by output, so that threads share the weight and read it once.
fn of_few(Sides { x, weight, bias }: Sides<'_>, extents: Extents, instructions: Instructions) -> Vec<bf16> {
    let Extents { rows, inputs, outputs } = extents;
    let x: Vec<f32> = x.iter().map(|number| number.load()).collect();
    let mut columns = vec![bf16::ZERO; rows * outputs]; // (outputs, rows)
    let parts = columns.par_chunks_mut(OUTPUTS * rows).zip(weight.par_chunks(OUTPUTS * inputs)).enumerate();
    parts.for_each(|(part, (out, weight))| {
        let bias = bias.map(|bias| &bias[part * OUTPUTS..]);
        instructions.run(Dots { out, x: &x, weight, bias, rows });
    });
    if rows == 1 {
        return columns;
    }
    (0..rows).flat_map(|row| columns[row..].iter().step_by(rows).copied()).collect()
}

/// `out[output][row] = bias[output] + Σ x(row, input) · weight(output, input)`.
struct Dots<'a> {
    out: &'a mut [bf16],
    x: &'a [f32],
    weight: &'a [bf16],
    bias: Option<&'a [bf16]>,
    rows: usize,
}

impl Task for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self) {
        let inputs = self.x.len() / self.rows;
        let outputs = self.out.chunks_exact_mut(self.rows).zip(self.weight.chunks_exact(inputs));
        for (output, (out, weight)) in outputs.enumerate() {
            let bias = self.bias.map_or(0.0, |bias| bias[output].load());
            for (out, x) in out.iter_mut().zip(self.x.chunks_exact(inputs)) {
                *out = bf16::store(bias + dot::<L>(x, weight));
            }
        }
    }
}

/// Sums side by side: as many as multiply-adds are under way at once.
const SUMS: usize = 64;

#[inline(always)]
fn dot<L: Level>(x: &[f32], weight: &[bf16]) -> f32 {
    let (x_parts, x_rest) = x.as_chunks::<SUMS>();
    let (weight_parts, weight_rest) = weight.as_chunks::<SUMS>();
    let mut sums = [0.0; SUMS];
    for (x, weight) in x_parts.iter().zip(weight_parts) {
        for sum in 0..SUMS {
            sums[sum] = x[sum].times_plus::<L>(weight[sum].load(), sums[sum]);
        }
    }
    let rest = x_rest.iter().zip(weight_rest).fold(0.0, |rest, (x, weight)| x.times_plus::<L>(weight.load(), rest));
    sums.into_iter().fold(rest, |total, sum| total + sum)
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
fn multiply(sums: &mut [f32], x: &[Pair], weight: &[Pair], instructions: Instructions) {
    let steps = weight.len() / ROW;
    for first in (0..steps).step_by(DEPTH) {
        let a = Strided { values: &x[first..], row_step: steps, inner_step: 1 };
        let inner = 0..DEPTH.min(steps - first);
        let product = Product { rows: x.len() / steps, inner: &[inner], a, b: &weight[first * ROW..], b_step: ROW };
        product.add_to(sums, ROW, instructions);
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

/// The same of a weight that is given as (inputs, outputs).
fn packed_columns(weight: &[bf16], Extents { inputs, outputs, .. }: Extents) -> Vec<Pair> {
    let steps = inputs.div_ceil(2);
    let mut packed = vec![Pair::default(); outputs.div_ceil(ROW) * steps * ROW];
    packed.par_chunks_mut(steps * ROW).enumerate().for_each(|(block, packed)| {
        let lanes = block * ROW..outputs.min((block + 1) * ROW);
        let row = |input: usize| &weight[input * outputs..][lanes.clone()];
        for (step, packed) in packed.chunks_exact_mut(ROW).enumerate() {
            let second = (2 * step + 1 < inputs).then(|| row(2 * step + 1));
            Pair::across(row(2 * step), second, packed);
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

    const CASES: [(usize, usize, usize); 9] = [
        (1, 1, 1),
        (1, 200, 67),
        (8, 65, 33),
        (13, 7, 33),
        (97, 64, 31),
        (40, 4100, 40),
        (9, 0, 2),
        (3, 0, 2),
        (0, 4, 4),
    ];

    #[test]
    fn sums_written_out_are_met_at_every_level() {
        for ((rows, inputs, outputs), instructions) in
            CASES.into_iter().flat_map(|case| Instructions::available().map(move |instructions| (case, instructions)))
        {
            let (x, weight, bias) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2), numbers(outputs, 3));
            let sides = Sides { x: &x, weight: &weight, bias: Some(&bias) };
            let got = product(sides, Extents { rows, inputs, outputs }, instructions);
            assert_eq!(got.len(), rows * outputs);
            for (index, got) in got.iter().enumerate() {
                let (x, weight) = (&x[index / outputs * inputs..], &weight[index % outputs * inputs..]);
                let products = x.iter().zip(weight).take(inputs).map(|(a, b)| a.to_f64() * b.to_f64());
                let want = bias[index % outputs].to_f64() + products.sum::<f64>();
                let bound = want.abs() / 250.0 + 1e-6 * inputs as f64;
                let name = format!("{rows} {inputs} {outputs}, {instructions:?}");
                assert!((got.to_f64() - want).abs() <= bound, "{name}: {got} for {want}");
            }
        }
    }

    #[test]
    fn a_weight_by_columns_gives_what_its_transpose_gives() {
        for ((rows, inputs, outputs), instructions) in
            CASES.into_iter().flat_map(|case| Instructions::available().map(move |instructions| (case, instructions)))
        {
            let (x, weight) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2));
            let transposed: Vec<bf16> =
                (0..inputs).flat_map(|input| weight[input..].iter().step_by(inputs).copied()).collect();
            let extents = Extents { rows, inputs, outputs };
            let got = product_by_columns(&x, &transposed, extents, instructions);
            let want = match rows {
                0 => Vec::new(),
                _ if inputs == 0 => vec![bf16::ZERO; rows * outputs],
                _ => of_many(Sides { x: &x, weight: &weight, bias: None }, extents, instructions),
            };
            assert_eq!(got, want, "{rows} {inputs} {outputs}, {instructions:?}");
        }
    }

    #[test]
    fn one_thread_and_three_give_the_same_bits() {
        let extents = Extents { rows: 100, inputs: 66, outputs: 40 };
        let (x, weight) = (numbers(100 * 66, 1), numbers(40 * 66, 2));
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| product(Sides { x: &x, weight: &weight, bias: None }, extents, Instructions::detect()))
        };
        assert_eq!(on(1), on(3));
    }
}
