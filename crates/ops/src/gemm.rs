//! [`product`] and [`matmul`]: x wᵀ + b and x w on the CPU, where candle is slower: it widens bf16 first, and its
//! product in f32 makes less of AVX2.
//!
//! BENCHMARKS.md has its speed with these block sizes on Zen 4 and Zen 5 (AVX-512 BF16), Emerald Rapids (AMX) and Zen 3
//! (AVX2).

mod few_rows;

use crate::simd::{
    Bf16Pair, CpuFeatures, Element, Isa, Lane, MatrixProduct, ROW, SimdKernel, Strided, pack_transposed,
};
use candle_core::DType;
use clearform_weights::{ProductPrecision, QuantizedMatrix};
use few_rows::small_product;
use rayon::prelude::*;

/// Rows of x per task, at most: with 32 outputs the accumulators are 12 KiB, which stay in the L1 cache. A multiple of
/// the heights of all panels: 12 rows (AVX-512), 16 (AMX) and 3 (AVX2).
const BLOCK_ROWS: usize = 96;

/// Rows of the highest panel that computes in registers.
const PANEL_ROWS: usize = 12;

/// Up to so many rows of x the weight is read as it is: packing it, which reads and writes all of it, would cost more
/// than the product.
const FEW_ROWS: usize = 8;

/// Dimensions of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GemmShape {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
}

impl GemmShape {
    /// Whether the weight is read as it is.
    pub fn has_few_rows(self) -> bool {
        self.rows <= FEW_ROWS
    }

    /// Whether [`product`] is faster than candle's product: in bf16 with any vectors or few rows, and in f32 with pairs
    /// of bf16 or with AVX2, where it saves a tenth of a step of FLUX (measured on Zen 3).
    pub fn is_faster_than_candle(self, dtype: DType, mode: GemmMode) -> bool {
        match dtype {
            DType::BF16 => self.rows <= FEW_ROWS || mode.features.has_simd(),
            DType::F32 => self.rows > FEW_ROWS && (mode.features.is_avx2_only() || mode.multiplies_pairs(dtype)),
            _ => false,
        }
    }
}

/// The operands of a product. The weight may be of another dtype than x.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GemmOperands<'a, E, W> {
    pub x: &'a [E],
    pub weight: WeightRows<'a, W>,
    pub bias: Option<&'a [E]>,
}

/// The rows of a weight of (outputs, inputs). Quantised ones are dequantised as they are read, and never as a whole.
#[derive(Debug, Clone, Copy)]
pub(crate) enum WeightRows<'a, W> {
    Dense(&'a [W]),
    Quantized(&'a QuantizedMatrix),
}

/// How products are computed: with which instructions, and of which precision those of f32 are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GemmMode {
    pub features: CpuFeatures,
    pub precision: ProductPrecision,
}

impl GemmMode {
    /// That of this processor.
    pub fn detect(precision: ProductPrecision) -> Self {
        Self { features: CpuFeatures::detect(), precision }
    }

    /// Whether values of `dtype` are multiplied as pairs of bf16.
    pub fn multiplies_pairs(self, dtype: DType) -> bool {
        self.features.multiplies_pairs(dtype, self.precision)
    }
}

/// x wᵀ + b, accumulated in f32 and rounded once.
///
/// # Shapes
/// x (rows, inputs), weight (outputs, inputs), bias (outputs) -> (rows, outputs).
pub(crate) fn product<E: Element<Work = f32>, W: Element<Work = f32>>(
    operands: GemmOperands<'_, E, W>,
    shape: GemmShape,
    mode: GemmMode,
) -> Vec<E> {
    let GemmShape { rows, inputs, outputs } = shape;
    if rows == 0 || outputs == 0 || inputs == 0 {
        return only_bias(vec![E::zero(); rows * outputs], operands.bias, outputs);
    }
    if rows <= FEW_ROWS { small_product(operands, shape, mode.features) } else { packed_product(operands, shape, mode) }
}

/// x w, accumulated in f32 and rounded once. With the gradient of [`product`]'s output as x this is the gradient of its
/// x.
///
/// # Shapes
/// x (rows, inputs), weight (inputs, outputs) -> (rows, outputs).
pub(crate) fn matmul<E: Element<Work = f32>, W: Element<Work = f32>>(
    x: &[E],
    weight: &[W],
    shape: GemmShape,
    mode: GemmMode,
) -> Vec<E> {
    if shape.rows == 0 || shape.outputs == 0 || shape.inputs == 0 {
        return vec![E::zero(); shape.rows * shape.outputs];
    }
    let packed = PackedWeight { shape, features: mode.features };
    if mode.multiplies_pairs(E::DTYPE) {
        packed.product(x, &packed.pack_columns::<W, Bf16Pair>(weight), None)
    } else {
        packed.product(x, &packed.pack_columns::<W, f32>(weight), None)
    }
}

/// [`product`] of many rows, over a packed weight.
fn packed_product<E: Element<Work = f32>, W: Element<Work = f32>>(
    operands: GemmOperands<'_, E, W>,
    shape: GemmShape,
    mode: GemmMode,
) -> Vec<E> {
    let GemmOperands { x, weight, bias } = operands;
    let packed = PackedWeight { shape, features: mode.features };
    if mode.multiplies_pairs(E::DTYPE) {
        packed.product(x, &packed.pack::<W, Bf16Pair>(weight), bias)
    } else {
        packed.product(x, &packed.pack::<W, f32>(weight), bias)
    }
}

/// A product over a weight that is packed in the order in which it is read: `[block of 32 outputs][input /
/// WIDTH][output]`, padded with zeros to whole blocks.
struct PackedWeight {
    shape: GemmShape,
    features: CpuFeatures,
}

impl PackedWeight {
    /// Packs a weight of (outputs, inputs).
    fn pack<W: Element<Work = f32>, F: Lane<Sum = f32>>(&self, weight: WeightRows<'_, W>) -> Vec<F> {
        match weight {
            WeightRows::Dense(weight) => self.pack_rows(weight),
            WeightRows::Quantized(matrix) => self.pack_quantized(matrix),
        }
    }

    /// Packs a quantised weight; what it stands for is rounded once.
    fn pack_quantized<F: Lane<Sum = f32>>(&self, matrix: &QuantizedMatrix) -> Vec<F> {
        let GemmShape { inputs, outputs, .. } = self.shape;
        self.pack_blocks(|block, out| {
            let first = block * ROW;
            let mut rows = vec![0.0; ROW.min(outputs - first) * inputs];
            matrix.dequantize(first, &mut rows);
            self.features.run(PackWeightRows { rows: &rows, inputs, out });
        })
    }

    /// Packs the values of a weight of (outputs, inputs).
    fn pack_rows<W: Element<Work = f32>, F: Lane<Sum = f32>>(&self, weight: &[W]) -> Vec<F> {
        let inputs = self.shape.inputs;
        self.pack_blocks(|block, out| {
            let rows = &weight[block * ROW * inputs..];
            self.features.run(PackWeightRows { rows: &rows[..rows.len().min(ROW * inputs)], inputs, out });
        })
    }

    /// Packs a weight of (inputs, outputs).
    fn pack_columns<W: Element<Work = f32>, F: Lane<Sum = f32>>(&self, weight: &[W]) -> Vec<F> {
        let outputs = self.shape.outputs;
        self.pack_blocks(|block, out| self.features.run(PackWeightColumns { weight, outputs, first: block * ROW, out }))
    }

    fn pack_blocks<F: Lane>(&self, fill: impl Fn(usize, &mut [F]) + Sync) -> Vec<F> {
        let GemmShape { inputs, outputs, .. } = self.shape;
        let block = inputs.div_ceil(F::WIDTH) * ROW;
        let mut packed = vec![F::default(); outputs.div_ceil(ROW) * block];
        packed.par_chunks_mut(block).enumerate().for_each(|(index, packed)| fill(index, packed));
        packed
    }

    fn product<E: Element<Work = f32>, F: Lane<Sum = f32>>(&self, x: &[E], weight: &[F], bias: Option<&[E]>) -> Vec<E> {
        let GemmShape { rows, inputs, outputs } = self.shape;
        let steps = inputs.div_ceil(F::WIDTH);
        let mut out = vec![E::zero(); rows * outputs];
        // Smaller blocks where some threads would have none otherwise. Sums do not depend on how rows are divided.
        let block_rows = rows.div_ceil(rayon::current_num_threads()).next_multiple_of(PANEL_ROWS).min(BLOCK_ROWS);
        let parts = out.par_chunks_mut(block_rows * outputs).zip(x.par_chunks(block_rows * inputs));
        parts.for_each(|(out, x)| {
            let mut packed_x = vec![F::default(); x.len() / inputs * steps];
            self.features.run(PackInputRows { rows: x, inputs, out: &mut packed_x });
            let mut sums = [0.0; BLOCK_ROWS * ROW];
            for (block, weight) in weight.chunks(steps * ROW).enumerate() {
                let first = block * ROW;
                start_at_bias(&mut sums, bias.map(|bias| &bias[first..outputs.min(first + ROW)]));
                self.multiply(&mut sums, &packed_x, weight);
                self.features.run(StoreTile { sums: &sums, out: &mut out[first..], outputs, lanes: outputs - first });
            }
        });
        out
    }

    /// `sums[row][lane] += Σ x(row, inner) · weight[inner][lane]`.
    fn multiply<F: Lane<Sum = f32>>(&self, sums: &mut [f32], x: &[F], weight: &[F]) {
        let steps = weight.len() / ROW;
        let depth = self.depth();
        for first in (0..steps).step_by(depth) {
            let a = Strided { values: &x[first..], row_step: steps, inner_step: 1 };
            let inner = 0..depth.min(steps - first);
            let product =
                MatrixProduct { rows: x.len() / steps, inner: &[inner], a, b: &weight[first * ROW..], b_step: ROW };
            product.add_to(sums, ROW, self.features);
        }
    }

    /// Inner indices that are accumulated before the sums are stored, whose rows of the weight stay in a cache. 2048
    /// rows of 128 bytes are 256 KiB, a quarter of the L2 cache of Zen 4. Panels of three rows read them four times as
    /// often as those of twelve, so with AVX2 192 rows, 24 KiB, stay in the 32 KiB of L1 of Zen 3.
    fn depth(&self) -> usize {
        if self.features.is_avx2_only() { 192 } else { 2048 }
    }
}

/// Packs rows of x.
pub(crate) struct PackInputRows<'a, E, F> {
    pub rows: &'a [E],
    pub inputs: usize,
    pub out: &'a mut [F],
}

impl<E: Element, F: Lane<Sum = E::Work>> SimdKernel for PackInputRows<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let steps = self.inputs.div_ceil(F::WIDTH);
        for (row, out) in self.rows.chunks_exact(self.inputs).zip(self.out.chunks_exact_mut(steps)) {
            F::pack_row(row, out);
        }
    }
}

/// Packs up to 32 rows of a weight of (outputs, inputs).
struct PackWeightRows<'a, E, F> {
    rows: &'a [E],
    inputs: usize,
    out: &'a mut [F],
}

impl<E: Element, F: Lane<Sum = E::Work>> SimdKernel for PackWeightRows<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        pack_transposed(self.rows.chunks_exact(self.inputs), self.out);
    }
}

/// Packs up to 32 columns, from `first` on, of a weight of (inputs, outputs).
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
            F::pack_two_rows(&rows[lanes.clone()], second, out);
        }
    }
}

/// Rounds the first `lanes` of 32 accumulators of each row and stores them, rows being `outputs` apart.
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

/// The product over no inputs.
fn only_bias<E: Element>(mut out: Vec<E>, bias: Option<&[E]>, outputs: usize) -> Vec<E> {
    if let Some(bias) = bias.filter(|_| outputs > 0) {
        out.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
    }
    out
}

/// Sets every row of sums to the bias, or to 0.
fn start_at_bias<E: Element<Work = f32>>(sums: &mut [f32], bias: Option<&[E]>) {
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

    fn values<E: Element<Work = f32>>(count: usize, seed: usize) -> Vec<E> {
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
        let shape = CASES.into_iter().map(|(rows, inputs, outputs)| GemmShape { rows, inputs, outputs });
        shape.flat_map(|shape| CpuFeatures::available().map(move |features| (shape, features)))
    }

    fn full(features: CpuFeatures) -> GemmMode {
        GemmMode { features, precision: ProductPrecision::Full }
    }

    /// `step` is the relative distance between neighbouring values of the dtype.
    fn check_sums<E: Element<Work = f32>>(step: f64) {
        for (shape, features) in cases() {
            let GemmShape { rows, inputs, outputs } = shape;
            let x = values::<E>(rows * inputs, 1);
            let weight = values::<E>(outputs * inputs, 2);
            let bias = values(outputs, 3);
            let operands = GemmOperands { x: &x, weight: WeightRows::Dense(&weight), bias: Some(&bias) };
            let got = product(operands, shape, full(features));
            assert_eq!(got.len(), rows * outputs);
            for (index, got) in got.iter().enumerate() {
                let x = &x[index / outputs * inputs..];
                let weight = &weight[index % outputs * inputs..];
                let products = x.iter().zip(weight).take(inputs).map(|(a, b)| a.to_f64() * b.to_f64());
                let want = bias[index % outputs].to_f64() + products.sum::<f64>();
                let bound = want.abs() * step + 1e-6 * inputs as f64;
                assert!((got.to_f64() - want).abs() <= bound, "{shape:?}, {features:?}: {got} for {want}");
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_sums_written_out() {
        check_sums::<bf16>(1.0 / 250.0);
        check_sums::<f32>(1e-6);
    }

    fn check_matmul<E: Element<Work = f32> + Debug>() {
        for (shape, features) in cases() {
            let GemmShape { rows, inputs, outputs } = shape;
            let x = values::<E>(rows * inputs, 1);
            let weight = values::<E>(outputs * inputs, 2);
            let transposed: Vec<E> =
                (0..inputs).flat_map(|input| weight[input..].iter().step_by(inputs).copied()).collect();
            let got = matmul(&x, &transposed, shape, full(features));
            let want = match rows {
                0 => Vec::new(),
                _ if inputs == 0 => vec![E::zero(); rows * outputs],
                _ => {
                    let weight = WeightRows::Dense(&weight);
                    packed_product(GemmOperands { x: &x, weight, bias: None }, shape, full(features))
                }
            };
            assert_eq!(got, want, "{shape:?}, {features:?}");
        }
    }

    #[test]
    fn matmul_is_the_product_with_the_transpose() {
        check_matmul::<bf16>();
        check_matmul::<f32>();
    }

    #[test]
    fn rounded_products_of_f32_are_those_of_the_rounded_values() {
        for (shape, features) in cases().filter(|(shape, _)| !shape.has_few_rows()) {
            let GemmShape { rows, inputs, outputs } = shape;
            let x = values::<f32>(rows * inputs, 1);
            let weight = values::<f32>(outputs * inputs, 2);
            let round = |values: &[f32]| values.iter().map(|value| bf16::from_f32(*value).to_f32()).collect::<Vec<_>>();
            let product_of = |x: &[f32], weight: &[f32], precision| {
                let operands = GemmOperands { x, weight: WeightRows::Dense(weight), bias: None };
                product(operands, shape, GemmMode { features, precision })
            };
            let got = product_of(&x, &weight, ProductPrecision::Bf16);
            let want = match features.has_bf16_dot() {
                true => product_of(&round(&x), &round(&weight), ProductPrecision::Full),
                false => product_of(&x, &weight, ProductPrecision::Full),
            };
            let near = |(got, want): (&f32, &f32)| (got - want).abs() <= 1e-5 * want.abs() + 1e-6 * inputs as f32;
            assert!(got.iter().zip(&want).all(near), "{shape:?}, {features:?}");
        }
    }

    #[test]
    fn one_thread_and_three_give_the_same_bits() {
        let shape = GemmShape { rows: 100, inputs: 66, outputs: 40 };
        let x = values::<bf16>(100 * 66, 1);
        let weight = values::<bf16>(40 * 66, 2);
        let product_on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let operands = GemmOperands { x: &x, weight: WeightRows::Dense(&weight), bias: None };
            pool.install(|| product(operands, shape, GemmMode::detect(ProductPrecision::Full)))
        };
        assert_eq!(product_on(1), product_on(3));
    }
}
