//! What holds for any problem: the fused kernel is the reference, whatever grid, radius, text, heads and pooling.

use super::problem::{ALL, Case, Inputs, distance, fused, gradients, initial_weight, numbers, output, plain};
use candle_core::{DType, Tensor};
use proptest::prelude::*;

/// Any problem with sides up to `side`; larger ones are drawn less often, since the reference holds the whole mask.
fn problems(side: usize, head_dim: usize) -> impl Strategy<Value = Case> {
    let shape = (1..=2usize, 1..=3usize, 4..=head_dim, 0..=70usize);
    let pattern = (0.5..50.0f64, prop_oneof![Just(None), (2..=5usize).prop_map(Some)], any::<bool>(), any::<bool>());
    (1..=side, 1..=side, shape, pattern).prop_map(|(height, width, shape, pattern)| {
        let ((batch, heads, head_dim, text), (radius, pooled, full, padded)) = (shape, pattern);
        let plan = match pooled {
            _ if full && pooled.is_none() => "full".to_owned(),
            None => format!("clear:r={radius}"),
            Some(factor) => format!("clear:r={radius},d={factor}"),
        };
        let counting = if padded && text > 4 { text - 1 } else { ALL };
        Case { grids: vec![(height, width)], text, batch, heads, head_dim, plan, counting }
    })
}

/// Error of `got` and of the plain operation in the same number format, against f64.
fn errors(case: &Case, dtype: DType) -> [f64; 2] {
    let exact = Inputs::new(case.clone(), DType::F64);
    let exact = output(&plain(&exact, &exact.tensors).unwrap());
    let inputs = Inputs::new(case.clone(), dtype);
    [fused, plain].map(|attend| distance(&output(&attend(&inputs, &inputs.tensors).unwrap()), &exact))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn forward_is_as_exact_as_the_plain_operation(case in problems(40, 40)) {
        for dtype in [DType::F32, DType::BF16] {
            let [ours, theirs] = errors(&case, dtype);
            prop_assert!(ours <= 2.0 * theirs + 1e-6, "{dtype:?}: {ours:e}, the plain operation {theirs:e}");
        }
    }

    #[test]
    fn forward_is_exact_for_any_head_dim(case in problems(9, 256)) {
        let [ours, theirs] = errors(&case, DType::F32);
        prop_assert!(ours <= 2.0 * theirs + 1e-6, "{ours:e}, the plain operation {theirs:e}");
    }

    #[test]
    fn backward_is_near_f64(case in problems(16, 40)) {
        let exact = gradients(&Inputs::new(case.clone(), DType::F64), plain);
        let got = gradients(&Inputs::new(case, DType::F32), fused);
        for (got, want) in got.iter().zip(&exact) {
            // Gradients that cancel to nothing have no relative error: 1 is the size of the loss's own terms.
            let size = want.iter().map(|x| x * x).sum::<f64>().sqrt().min(1.0);
            prop_assert!(distance(got, want) * size <= 1e-4);
        }
    }

    #[test]
    fn one_thread_and_two_give_the_same_bits(case in problems(36, 40)) {
        let inputs = Inputs::new(case, DType::F32);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| (output(&fused(&inputs, &inputs.tensors).unwrap()), gradients(&inputs, fused)))
        };
        prop_assert_eq!(on(1), on(2));
    }

    /// Tiles are wider than high: on its side, a grid is cut in another way.
    #[test]
    fn a_grid_on_its_side_gives_the_same(case in problems(20, 24)) {
        let (height, width) = case.grids[0];
        let upright = Inputs::new(case.clone(), DType::F32);
        let mut lying = Inputs::new(Case { grids: vec![(width, height)], ..case }, DType::F32);
        let turn = |x: &Tensor| {
            let (batch, _, heads, head_dim) = x.dims4().unwrap();
            let grid = x.reshape((batch, height, width, heads * head_dim)).unwrap().transpose(1, 2).unwrap();
            grid.contiguous().unwrap().reshape((batch, height * width, heads, head_dim)).unwrap()
        };
        for index in 3..6 {
            let raster = upright.geometry.to_raster(&upright.tensors[index]).unwrap();
            lying.tensors[index] = lying.geometry.to_tiles(&turn(&raster)).unwrap();
        }
        if let Some(weight) = lying.tensors.get_mut(6) {
            *weight = weight.transpose(3, 5).unwrap().contiguous().unwrap();
        }
        let image = |inputs: &Inputs| inputs.geometry.to_raster(&fused(inputs, &inputs.tensors).unwrap().image).unwrap();
        prop_assert!(distance(&numbers(&image(&lying)), &numbers(&turn(&image(&upright)))) < 2e-6);
    }

    /// Shares add up to one, so equal values come out as they went in: nothing is left unwritten.
    #[test]
    fn every_output_is_written(case in problems(40, 70)) {
        let mut inputs = Inputs::new(case, DType::F32);
        for index in [2, 5] {
            inputs.tensors[index] = inputs.tensors[index].ones_like().unwrap();
        }
        if let Some(weight) = inputs.tensors.get_mut(6) {
            *weight = initial_weight(&inputs.case).unwrap();
        }
        let got = output(&fused(&inputs, &inputs.tensors).unwrap());
        prop_assert!(got.iter().all(|value| (value - 1.0).abs() < 1e-5));
    }
}
