//! [`product`]: x wᵀ + b and x w of our own, for numbers that the tensor library would widen first and for instructions
//! that it makes less of. Knows no tensor.

use crate::simd::{
    Bf16Pair, CpuFeatures, Element, Isa, Lane, MatrixProduct, ROW, Real, SimdKernel, Strided, side_by_side,
};
use candle_core::DType;
use rayon::prelude::*;

/// Rows of x that one thread takes at a time, at most.
const ROWS: usize = 96;

/// Rows that the product computes together, at most.
const PANEL: usize = 12;

/// Rows of x up to which the weight is read as it stands: packing it would cost more than the product.
const FEW: usize = 8;

/// Outputs that one thread takes at a time where rows are few.
const OUTPUTS: usize = 32;

/// Extents of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GemmShape {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
}

impl GemmShape {
    /// Whether [`product`] is faster than the tensor library's.
    pub fn suit(self, format: DType, features: CpuFeatures) -> bool {
        match format {
            DType::BF16 => self.rows <= FEW || features.have_vectors(),
            DType::F32 => self.rows > FEW && features.are_narrow(),
            _ => false,
        }
    }
}

/// The numbers of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GemmOperands<'a, E> {
    pub x: &'a [E],
    pub weight: &'a [E],
    pub bias: Option<&'a [E]>,
}

/// x wᵀ + b, summed in f32 and rounded once.
///
/// # Shapes
/// x (rows, inputs), weight (outputs, inputs), bias (outputs) -> (rows, outputs).
pub(crate) fn product<E: Element<Work = f32>>(
    sides: GemmOperands<'_, E>,
    extents: GemmShape,
    features: CpuFeatures,
) -> Vec<E> {
    let GemmShape { rows, inputs, outputs } = extents;
    if rows == 0 || outputs == 0 || inputs == 0 {
        return biased(vec![E::zero(); rows * outputs], sides.bias, outputs);
    }
    if rows <= FEW { of_few(sides, extents, features) } else { of_many(sides, extents, features) }
}

/// x w, summed in f32 and rounded once: the gradient of x, where x is that of the product.
///
/// # Shapes
/// x (rows, inputs), weight (inputs, outputs) -> (rows, outputs).
pub(crate) fn product_by_columns<E: Element<Work = f32>>(
    x: &[E],
    weight: &[E],
    extents: GemmShape,
    features: CpuFeatures,
) -> Vec<E> {
    if extents.rows == 0 || extents.outputs == 0 || extents.inputs == 0 {
        return vec![E::zero(); extents.rows * extents.outputs];
    }
    let packed = PackedWeight { extents, features };
    if by_pairs::<E>(features) {
        packed.product(x, &packed.columns::<E, Bf16Pair>(weight), None)
    } else {
        packed.product(x, &packed.columns::<E, f32>(weight), None)
    }
}

fn of_many<E: Element<Work = f32>>(sides: GemmOperands<'_, E>, extents: GemmShape, features: CpuFeatures) -> Vec<E> {
    let (GemmOperands { x, weight, bias }, packed) = (sides, PackedWeight { extents, features });
    if by_pairs::<E>(features) {
        packed.product(x, &packed.rows::<E, Bf16Pair>(weight), bias)
    } else {
        packed.product(x, &packed.rows::<E, f32>(weight), bias)
    }
}

fn by_pairs<E: Element>(features: CpuFeatures) -> bool {
    E::DTYPE == DType::BF16 && features.multiply_pairs()
}

/// A product whose weight is brought into the order that it is read in: [block of 32 outputs][factor of inputs][output],
/// 0 where a block is wider than what is left.
struct PackedWeight {
    extents: GemmShape,
    features: CpuFeatures,
}

impl PackedWeight {
    /// A weight that is given as (outputs, inputs).
    fn rows<E: Element<Work = f32>, F: Lane<Sum = f32>>(&self, weight: &[E]) -> Vec<F> {
        let inputs = self.extents.inputs;
        self.blocks(|block, out| {
            let rows = &weight[block * ROW * inputs..];
            self.features.run(PackWeightRows { rows: &rows[..rows.len().min(ROW * inputs)], inputs, out });
        })
    }

    /// A weight that is given as (inputs, outputs).
    fn columns<E: Element<Work = f32>, F: Lane<Sum = f32>>(&self, weight: &[E]) -> Vec<F> {
        let outputs = self.extents.outputs;
        self.blocks(|block, out| self.features.run(PackWeightColumns { weight, outputs, first: block * ROW, out }))
    }

    fn blocks<F: Lane>(&self, fill: impl Fn(usize, &mut [F]) + Sync) -> Vec<F> {
        let GemmShape { inputs, outputs, .. } = self.extents;
        let block = inputs.div_ceil(F::WIDTH) * ROW;
        let mut packed = vec![F::default(); outputs.div_ceil(ROW) * block];
        packed.par_chunks_mut(block).enumerate().for_each(|(index, packed)| fill(index, packed));
        packed
    }

    fn product<E: Element<Work = f32>, F: Lane<Sum = f32>>(&self, x: &[E], weight: &[F], bias: Option<&[E]>) -> Vec<E> {
        let GemmShape { rows, inputs, outputs } = self.extents;
        let steps = inputs.div_ceil(F::WIDTH);
        let mut out = vec![E::zero(); rows * outputs];
        // Fewer where threads would have none otherwise; each sum is the same however rows are shared out.
        let at_a_time = rows.div_ceil(rayon::current_num_threads()).next_multiple_of(PANEL).min(ROWS);
        let parts = out.par_chunks_mut(at_a_time * outputs).zip(x.par_chunks(at_a_time * inputs));
        parts.for_each(|(out, x)| {
            let mut factors = vec![F::default(); x.len() / inputs * steps];
            self.features.run(WidenRows { rows: x, inputs, out: &mut factors });
            let mut sums = [0.0; ROWS * ROW];
            for (block, weight) in weight.chunks(steps * ROW).enumerate() {
                let first = block * ROW;
                begin(&mut sums, bias.map(|bias| &bias[first..outputs.min(first + ROW)]));
                self.multiply(&mut sums, &factors, weight);
                self.features.run(StoreTile { sums: &sums, out: &mut out[first..], outputs, lanes: outputs - first });
            }
        });
        out
    }

    /// sums[row][lane] += Σ x(row, factor) · weight[factor][lane].
    fn multiply<F: Lane<Sum = f32>>(&self, sums: &mut [f32], x: &[F], weight: &[F]) {
        let (steps, depth) = (weight.len() / ROW, self.depth());
        for first in (0..steps).step_by(depth) {
            let a = Strided { values: &x[first..], row_step: steps, inner_step: 1 };
            let inner = 0..depth.min(steps - first);
            let product =
                MatrixProduct { rows: x.len() / steps, inner: &[inner], a, b: &weight[first * ROW..], b_step: ROW };
            product.add_to(sums, ROW, self.features);
        }
    }

    /// Factors that are summed before the sums are stored: as many rows of the weight stay in the second cache, or in the
    /// first where panels are low and so read them more often.
    fn depth(&self) -> usize {
        if self.features.are_narrow() { 192 } else { 2048 }
    }
}

/// Rows of numbers as rows of factors.
struct WidenRows<'a, E, F> {
    rows: &'a [E],
    inputs: usize,
    out: &'a mut [F],
}

impl<E: Element, F: Lane<Sum = E::Work>> SimdKernel for WidenRows<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let steps = self.inputs.div_ceil(F::WIDTH);
        for (row, out) in self.rows.chunks_exact(self.inputs).zip(self.out.chunks_exact_mut(steps)) {
            F::along(row, out);
        }
    }
}

/// Up to 32 rows of a weight, (outputs, inputs).
struct PackWeightRows<'a, E, F> {
    rows: &'a [E],
    inputs: usize,
    out: &'a mut [F],
}

impl<E: Element, F: Lane<Sum = E::Work>> SimdKernel for PackWeightRows<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        side_by_side(self.rows.chunks_exact(self.inputs), self.out);
    }
}

/// Up to 32 columns, from `first` on, of a weight, (inputs, outputs).
struct PackWeightColumns<'a, E, F> {
    weight: &'a [E],
    outputs: usize,
    first: usize,
    out: &'a mut [F],
}

impl<E: Element, F: Lane<Sum = E::Work>> SimdKernel for PackWeightColumns<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let lanes = self.first..self.outputs.min(self.first + ROW);
        let rows = self.weight.chunks_exact(F::WIDTH * self.outputs);
        let last = rows.remainder();
        for (rows, out) in rows.chain((!last.is_empty()).then_some(last)).zip(self.out.chunks_exact_mut(ROW)) {
            let second = rows.get(self.outputs..2 * self.outputs).map(|second| &second[lanes.clone()]);
            F::across(&rows[lanes.clone()], second, out);
        }
    }
}

/// Sums of 32 lanes to the first `lanes` numbers of rows, `outputs` apart.
struct StoreTile<'a, E: Element> {
    sums: &'a [E::Work],
    out: &'a mut [E],
    outputs: usize,
    lanes: usize,
}

impl<E: Element> SimdKernel for StoreTile<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let lanes = self.lanes.min(ROW);
        for (out, sums) in self.out.chunks_mut(self.outputs).zip(self.sums.chunks_exact(ROW)) {
            out[..lanes].iter_mut().zip(sums).for_each(|(out, sum)| *out = E::store(*sum));
        }
    }
}

/// Output by output, so that threads share the weight and read it once.
fn of_few<E: Element<Work = f32>>(sides: GemmOperands<'_, E>, extents: GemmShape, features: CpuFeatures) -> Vec<E> {
    let (GemmOperands { x, weight, bias }, GemmShape { rows, inputs, outputs }) = (sides, extents);
    let x: Vec<f32> = x.iter().map(|number| number.load()).collect();
    let mut columns = vec![E::zero(); rows * outputs]; // (outputs, rows)
    let parts = columns.par_chunks_mut(OUTPUTS * rows).zip(weight.par_chunks(OUTPUTS * inputs)).enumerate();
    parts.for_each(|(part, (out, weight))| {
        let bias = bias.map(|bias| &bias[part * OUTPUTS..]);
        features.run(DotProducts { out, x: &x, weight, bias, rows });
    });
    if rows == 1 {
        return columns;
    }
    (0..rows).flat_map(|row| columns[row..].iter().step_by(rows).copied()).collect()
}

/// `out[output][row] = bias[output] + Σ x(row, input) · weight(output, input)`.
struct DotProducts<'a, E> {
    out: &'a mut [E],
    x: &'a [f32],
    weight: &'a [E],
    bias: Option<&'a [E]>,
    rows: usize,
}

impl<E: Element<Work = f32>> SimdKernel for DotProducts<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let inputs = self.x.len() / self.rows;
        let outputs = self.out.chunks_exact_mut(self.rows).zip(self.weight.chunks_exact(inputs));
        for (output, (out, weight)) in outputs.enumerate() {
            let bias = self.bias.map_or(0.0, |bias| bias[output].load());
            for (out, x) in out.iter_mut().zip(self.x.chunks_exact(inputs)) {
                *out = E::store(bias + dot::<E, L>(x, weight));
            }
        }
    }
}

/// Sums side by side: as many as multiply-adds are under way at once.
const SUMS: usize = 64;

#[inline(always)]
fn dot<E: Element<Work = f32>, L: Isa>(x: &[f32], weight: &[E]) -> f32 {
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

fn biased<E: Element>(mut out: Vec<E>, bias: Option<&[E]>, outputs: usize) -> Vec<E> {
    if let Some(bias) = bias.filter(|_| outputs > 0) {
        out.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
    }
    out
}

/// Every row of sums to the bias, or to 0.
fn begin<E: Element<Work = f32>>(sums: &mut [f32], bias: Option<&[E]>) {
    sums.fill(0.0);
    let Some(bias) = bias else { return };
    for row in sums.chunks_exact_mut(ROW) {
        row.iter_mut().zip(bias).for_each(|(sum, bias)| *sum = bias.load());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use std::fmt::Debug;

    fn numbers<E: Element<Work = f32>>(count: usize, seed: usize) -> Vec<E> {
        (0..count).map(|i| E::store(((i * 7919 + seed) as f64 * 0.618).sin() as f32)).collect()
    }

    const CASES: [(usize, usize, usize); 10] = [
        (1, 1, 1),
        (1, 200, 67),
        (8, 65, 33),
        (13, 7, 33),
        (97, 64, 31),
        (40, 4100, 40),
        (10, 400, 64),
        (9, 0, 2),
        (3, 0, 2),
        (0, 4, 4),
    ];

    fn cases() -> impl Iterator<Item = (GemmShape, CpuFeatures)> {
        let extents = CASES.into_iter().map(|(rows, inputs, outputs)| GemmShape { rows, inputs, outputs });
        extents.flat_map(|extents| CpuFeatures::available().map(move |features| (extents, features)))
    }

    /// `step` is the relative distance of neighbouring numbers.
    fn sums_written_out_are_met<E: Element<Work = f32>>(step: f64) {
        for (extents, features) in cases() {
            let GemmShape { rows, inputs, outputs } = extents;
            let (x, weight, bias) = (numbers::<E>(rows * inputs, 1), numbers(outputs * inputs, 2), numbers(outputs, 3));
            let sides = GemmOperands { x: &x, weight: &weight, bias: Some(&bias) };
            let got = product(sides, extents, features);
            assert_eq!(got.len(), rows * outputs);
            for (index, got) in got.iter().enumerate() {
                let (x, weight) = (&x[index / outputs * inputs..], &weight[index % outputs * inputs..]);
                let products = x.iter().zip(weight).take(inputs).map(|(a, b)| a.to_f64() * b.to_f64());
                let want = bias[index % outputs].to_f64() + products.sum::<f64>();
                let bound = want.abs() * step + 1e-6 * inputs as f64;
                assert!((got.to_f64() - want).abs() <= bound, "{extents:?}, {features:?}: {got} for {want}");
            }
        }
    }

    #[test]
    fn sums_written_out_are_met_at_every_level() {
        sums_written_out_are_met::<bf16>(1.0 / 250.0);
        sums_written_out_are_met::<f32>(1e-6);
    }

    fn a_weight_by_columns_gives_the_same<E: Element<Work = f32> + Debug>() {
        for (extents, features) in cases() {
            let GemmShape { rows, inputs, outputs } = extents;
            let (x, weight) = (numbers::<E>(rows * inputs, 1), numbers::<E>(outputs * inputs, 2));
            let transposed: Vec<E> =
                (0..inputs).flat_map(|input| weight[input..].iter().step_by(inputs).copied()).collect();
            let got = product_by_columns(&x, &transposed, extents, features);
            let want = match rows {
                0 => Vec::new(),
                _ if inputs == 0 => vec![E::zero(); rows * outputs],
                _ => of_many(GemmOperands { x: &x, weight: &weight, bias: None }, extents, features),
            };
            assert_eq!(got, want, "{extents:?}, {features:?}");
        }
    }

    #[test]
    fn a_weight_by_columns_gives_what_its_transpose_gives() {
        a_weight_by_columns_gives_the_same::<bf16>();
        a_weight_by_columns_gives_the_same::<f32>();
    }

    #[test]
    fn one_thread_and_three_give_the_same_bits() {
        let extents = GemmShape { rows: 100, inputs: 66, outputs: 40 };
        let (x, weight) = (numbers::<bf16>(100 * 66, 1), numbers::<bf16>(40 * 66, 2));
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                product(GemmOperands { x: &x, weight: &weight, bias: None }, extents, CpuFeatures::detect())
            })
        };
        assert_eq!(on(1), on(3));
    }
}
