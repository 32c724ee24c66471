//! The kernel with every instruction set and lane type, and into memory filled with NaN.
#![allow(clippy::unwrap_used)] // A failed test says where.

use super::*;
use crate::{Radius, TokenGrid};
use backward::BackwardInputs;
use candle_core::WithDType as _;
use clearform_ops::TorchGenerator;
use clearform_ops::simd::{Bf16Pair, Element, Lane};
use half::bf16;

struct Inputs {
    image: Qkv,
    text: Qkv,
    geometry: Geometry,
    window: Window,
}

/// Grid, text tokens, head_dim and radius. Text of odd length makes the image begin at an odd position, and ragged
/// grids make cells begin there.
type Case = ((usize, usize), usize, usize, f64);

const CASES: [Case; 4] = [((8, 8), 4, 32, 3.0), ((9, 14), 7, 24, 4.5), ((5, 7), 1, 9, 2.0), ((1, 37), 65, 16, 4.0)];

/// Enough tiles for the backward to divide a head into parts.
const LARGE: Case = ((37, 41), 71, 4, 3.0);

impl Inputs {
    fn new(((height, width), text, head_dim, radius): Case) -> Self {
        let geometry = Geometry::new(vec![TokenGrid::new(height, width).unwrap()]);
        let mut generator = TorchGenerator::new(0);
        let mut random = |tokens: usize| {
            let mut noise = || generator.randn((2, tokens, 2, head_dim)).unwrap();
            Qkv { query: noise(), key: noise(), value: noise() }.converted(DType::BF16)
        };
        let window = Window { radius: Some(Radius::new(radius).unwrap()), pool: None };
        Self { image: random(height * width), text: random(text), geometry, window }
    }

    /// The reference in a dtype, text and image concatenated.
    fn plain(&self, dtype: DType) -> Vec<f64> {
        let image = self.image.converted(dtype);
        let text = self.text.converted(dtype);
        let out = reference::attend(image, Some(text), &self.geometry, &self.window).unwrap();
        elements(&Tensor::cat(&[&out.text.unwrap(), &out.image], 1).unwrap())
    }

    fn problem<E: Element>(&self, features: CpuFeatures) -> (Problem, [Vec<E>; 3]) {
        let sequence =
            JointSequence::new(self.image.clone(), Some(self.text.clone()), &self.geometry, &self.window).unwrap();
        let values = |x: &Tensor| x.flatten_all().unwrap().to_dtype(E::DTYPE).unwrap().to_vec1::<E>().unwrap();
        let problem = Problem::new(&sequence, &self.geometry, self.window.radius, features).unwrap();
        (problem, [&sequence.query, &sequence.key, &sequence.value].map(values))
    }

    /// Output and gradients of query, key and value, with the values as the gradient of the output, by products in
    /// lanes of `F` and into memory filled with `before`.
    fn computed<E: Element, F: Lane<Sum = E::Work>>(&self, features: CpuFeatures, before: f64) -> [Vec<f64>; 4] {
        let (problem, inputs) = self.problem::<E>(features);
        let [query, key, value] = inputs.each_ref().map(Vec::as_slice);
        let filled = |values: &[E]| vec![E::from_f64(before); values.len()];
        let mut out = filled(query);
        let mut scales = vec![[E::Work::from_f64(before); 2]; out.len() / problem.head_dim];
        forward::forward_into::<E, F>(&problem, [query, key, value], &mut out, &mut scales);
        let scales: Vec<_> = scales.into_iter().map(|scale| scale.map(|value| value.to_f64())).collect();
        let inputs = BackwardInputs { query, key, value, out: &out, grad: value, scales: &scales };
        let [mut query_grad, mut key_grad, mut value_grad] = [query, key, value].map(filled);
        backward::backward_into::<E, F>(&problem, &inputs, [&mut query_grad, &mut key_grad, &mut value_grad]);
        [out, query_grad, key_grad, value_grad].map(|values| values.into_iter().map(|value| value.to_f64()).collect())
    }
}

impl Qkv {
    fn converted(&self, dtype: DType) -> Self {
        let [query, key, value] = [&self.query, &self.key, &self.value].map(|x| x.to_dtype(dtype).unwrap());
        Self { query, key, value }
    }
}

fn elements(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let mut difference = 0.0;
    let mut size = 0.0;
    for (got, want) in got.iter().zip(want) {
        difference += (got - want) * (got - want);
        size += want * want;
    }
    f64::sqrt(difference / size)
}

#[test]
fn pairs_of_bf16_match_f32_with_every_instruction_set() {
    for case in CASES.into_iter().chain([LARGE]) {
        let inputs = Inputs::new(case);
        let exact = inputs.plain(DType::F64);
        let plain = distance(&inputs.plain(DType::BF16), &exact);
        for features in CpuFeatures::available() {
            let paired = inputs.computed::<bf16, Bf16Pair>(features, 0.0);
            let single = inputs.computed::<bf16, f32>(features, 0.0);
            let rounded = inputs.computed::<f32, Bf16Pair>(features, 0.0);
            for [out, ..] in [&paired, &single, &rounded] {
                let error = distance(out, &exact);
                assert!(error <= 2.0 * plain + 1e-6, "{case:?}, {features:?}: {error:e}, plain {plain:e}");
            }
            for (got, want) in paired[1..].iter().chain(&rounded[1..]).zip(single[1..].iter().cycle()) {
                let error = distance(got, want);
                assert!(error <= 1e-2, "{case:?}, {features:?}: gradients differ by {error:e}");
            }
        }
    }
}

/// Outputs filled with NaN before give the same bits as outputs filled with zeros.
#[test]
fn old_contents_of_the_outputs_are_ignored() {
    fn check<E: Element, F: Lane<Sum = E::Work>>(case: Case) {
        let inputs = Inputs::new(case);
        let [clean, poisoned] = [0.0, f64::NAN].map(|before| inputs.computed::<E, F>(CpuFeatures::detect(), before));
        assert!(poisoned.iter().flatten().all(|value| value.is_finite()), "{case:?}, {:?}", E::DTYPE);
        assert_eq!(clean, poisoned, "{case:?}, {:?}", E::DTYPE);
    }
    for case in CASES.into_iter().chain([LARGE]) {
        check::<f32, f32>(case);
        check::<f64, f64>(case);
        check::<bf16, f32>(case);
        check::<bf16, Bf16Pair>(case);
        check::<f32, Bf16Pair>(case);
    }
}

/// Parts have sums only for the keys that their tiles visit, and are added in order.
#[test]
fn a_head_in_parts_gives_the_same_bits_on_any_number_of_threads() {
    let inputs = Inputs::new(LARGE);
    let computed_on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| inputs.computed::<f32, f32>(CpuFeatures::detect(), 0.0))
    };
    assert_eq!(computed_on(1), computed_on(2));
    let (problem, _) = inputs.problem::<f32>(CpuFeatures::detect());
    let tiles = &problem.tiles;
    assert!(problem.image_keys(&tiles[tiles.len() - 16..]).len() < 37 * 41 / 2);
    assert_eq!(problem.image_keys(tiles), 71..71 + 37 * 41);
}
