//! Properties of any problem: the fused kernel matches the reference for any grid, radius, text, heads, pooling and
//! instruction set.

use super::problem::{Case, Inputs, Mask, case, distance, elements, fused, gradient_errors, gradients, plain, result};
use candle_core::{DType, Tensor};
use clearform_ops::simd::CpuFeatures;
use proptest::prelude::*;

/// The most multiply-adds for which the reference, with its full mask, is fast enough.
const AFFORDABLE: usize = 1 << 28;

const CELLS: [(usize, usize); 5] = [(4, 4), (2, 8), (8, 2), (1, 16), (16, 1)];

/// A grid, sometimes with a small second one.
fn grids() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let side = || prop_oneof![2 => 1..=12usize, 1 => 1..=40usize];
    let second = prop_oneof![3 => Just(None), 1 => (1..=6usize, 1..=6usize).prop_map(Some)];
    (side(), side(), second).prop_map(|(height, width, second)| [(height, width)].into_iter().chain(second).collect())
}

fn plans() -> impl Strategy<Value = String> {
    let radius = || 0.5..50.0f64;
    prop_oneof![
        1 => Just("full".to_owned()),
        2 => radius().prop_map(|radius| format!("clear:r={radius}")),
        2 => (radius(), 2..=5usize).prop_map(|(radius, factor)| format!("clear:r={radius},d={factor}")),
    ]
}

fn masks() -> impl Strategy<Value = Mask> {
    prop_oneof![
        1 => Just(Mask::None),
        1 => (0..1000usize).prop_map(Mask::Some),
        1 => (0..70usize).prop_map(Mask::First),
    ]
}

/// Any problem; batch and heads are limited to what is affordable.
fn problems() -> impl Strategy<Value = Case> {
    let head_dim = prop_oneof![2 => 4..=40usize, 1 => 4..=256usize];
    let shape = (1..=3usize, 1..=3usize, head_dim, prop_oneof![1 => Just(0), 4 => 0..=70usize], any::<bool>());
    let instruction_sets: Vec<CpuFeatures> = CpuFeatures::available().collect();
    let chosen = (prop::sample::select(instruction_sets), prop::sample::select(CELLS.to_vec()));
    (grids(), shape, plans(), masks(), chosen).prop_map(|(grids, shape, plan, mask, (features, cell))| {
        let (batch, heads, head_dim, text, empty_stream) = shape;
        let tokens = text + grids.iter().map(|(height, width)| height * width).sum::<usize>();
        let most = (AFFORDABLE / (tokens * tokens * head_dim)).max(1);
        let batch = batch.min(most);
        let heads = heads.min(most / batch);
        Case { batch, heads, head_dim, empty_stream, mask, cell, features, ..case(&grids, text, &plan) }
    })
}

/// The same problem with tokens in another order.
fn reordered(inputs: &Inputs, cell: (usize, usize)) -> Inputs {
    let case = Case { cell, ..inputs.case.clone() };
    let mut other = Inputs { geometry: case.geometry(), case, tensors: inputs.tensors.clone() };
    for tensor in &mut other.tensors[3..6] {
        *tensor = other.geometry.to_tiles(&inputs.geometry.to_raster(tensor).unwrap()).unwrap();
    }
    other
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_forward_is_as_accurate_as_the_reference(case in problems()) {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let inputs = Inputs::new(case.clone(), dtype);
            let exact = result(&inputs.exact(), plain);
            let [ours, theirs] = [fused, plain].map(|attend| distance(&result(&inputs, attend), &exact));
            prop_assert!(ours <= 2.0 * theirs + 1e-6, "{dtype:?}: {ours:e}, reference {theirs:e}");
        }
    }

    #[test]
    fn the_backward_is_near_f64(case in problems()) {
        let inputs = Inputs::new(case, DType::F32);
        let got = gradients(&inputs, fused);
        let want = gradients(&inputs.exact(), plain);
        for (index, error) in gradient_errors(&got, &want).into_iter().enumerate() {
            prop_assert!(error <= 1e-4, "tensor {index}: {error:e}");
        }
    }

    #[test]
    fn one_thread_and_two_give_the_same_bits(case in problems()) {
        for dtype in [DType::F32, DType::BF16] {
            let inputs = Inputs::new(case.clone(), dtype);
            let results_on = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| (result(&inputs, fused), gradients(&inputs, fused)))
            };
            prop_assert_eq!(results_on(1), results_on(2));
        }
    }

    #[test]
    fn cells_of_any_shape_give_the_same(case in problems()) {
        let inputs = Inputs::new(case, DType::F32);
        let raster = |inputs: &Inputs, x: &Tensor| elements(&inputs.geometry.to_raster(x).unwrap());
        let results = |inputs: &Inputs| {
            let out = fused(inputs, &inputs.tensors).unwrap();
            (raster(inputs, &out.image), out.text.as_ref().map(elements).unwrap_or_default())
        };
        let (image, text) = results(&inputs);
        for cell in CELLS {
            let (other_image, other_text) = results(&reordered(&inputs, cell));
            prop_assert!(distance(&other_image, &image) < 2e-6, "{:?}", cell);
            prop_assert!(distance(&other_text, &text) < 2e-6, "{:?}", cell);
        }
    }
}
