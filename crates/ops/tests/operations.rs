//! Every operation compared with its reference, its gradients with finite differences, and frozen arguments.
#![allow(clippy::unwrap_used)] // A failed test says where.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, Var};
use clearform_ops::{self as ops, reference};
use clearform_weights::{BaseWeight, Fp8, LowRank, ProductPrecision, QuantizedFormat, QuantizedMatrix, Weight};

type Operation = fn(&[Tensor]) -> Result<Tensor>;

/// An operation with the shapes of its arguments. The last `constants` arguments get no gradient.
struct Case {
    name: &'static str,
    fused: Operation,
    plain: Operation,
    shapes: &'static [&'static [usize]],
    constants: usize,
}

const CASES: &[Case] = &[
    Case {
        name: "dense_linear",
        fused: |a| ops::dense_linear(&a[0], &a[1], None),
        plain: |a| reference::dense_linear(&a[0], &a[1], None),
        shapes: &[&[2, 3, 5], &[7, 5]],
        constants: 0,
    },
    Case {
        name: "dense_linear with bias",
        fused: |a| ops::dense_linear(&a[0], &a[1], Some(&a[2])),
        plain: |a| reference::dense_linear(&a[0], &a[1], Some(&a[2])),
        shapes: &[&[2, 19, 17], &[7, 17], &[7]],
        constants: 0,
    },
    Case {
        name: "linear with low-rank terms",
        fused: |a| ops::linear(&a[0], &with_terms(a), Some(&a[2])),
        plain: |a| reference::linear(&a[0], &with_terms(a), Some(&a[2])),
        shapes: &[&[2, 19, 17], &[7, 17], &[7], &[4, 17], &[7, 4], &[1, 17], &[7, 1]],
        constants: 0,
    },
    Case {
        name: "modulated_layer_norm",
        fused: |a| ops::modulated_layer_norm(&a[0], &a[1], &a[2], 1e-6),
        plain: |a| reference::modulated_layer_norm(&a[0], &a[1], &a[2], 1e-6),
        shapes: &[&[2, 5, 37], &[2, 37], &[2, 37]],
        constants: 0,
    },
    Case {
        name: "rms_norm",
        fused: |a| ops::rms_norm(&a[0], &a[1], 1e-6),
        plain: |a| reference::rms_norm(&a[0], &a[1], 1e-6),
        shapes: &[&[2, 3, 2, 21], &[21]],
        constants: 0,
    },
    Case {
        name: "rms_norm_rope",
        fused: |a| ops::rms_norm_rope(&a[0], &a[1], &a[2], &a[3], 1e-6),
        plain: |a| reference::rms_norm_rope(&a[0], &a[1], &a[2], &a[3], 1e-6),
        shapes: &[&[2, 5, 3, 24], &[24], &[5, 12], &[5, 12]],
        constants: 2,
    },
    Case {
        name: "rope",
        fused: |a| ops::rope(&a[0], &a[1], &a[2]),
        plain: |a| reference::rope(&a[0], &a[1], &a[2]),
        shapes: &[&[2, 5, 3, 24], &[5, 12], &[5, 12]],
        constants: 2,
    },
    Case {
        name: "group_norm",
        fused: |a| ops::group_norm(&a[0], 3, &a[1], &a[2], 1e-5),
        plain: |a| reference::group_norm(&a[0], 3, &a[1], &a[2], 1e-5),
        shapes: &[&[2, 6, 5, 7], &[6], &[6]],
        constants: 0,
    },
    Case { name: "silu", fused: |a| ops::silu(&a[0]), plain: |a| a[0].silu(), shapes: &[&[3, 5, 7]], constants: 0 },
    Case {
        name: "swiglu",
        fused: |a| ops::swiglu(&a[0], &a[1]),
        plain: |a| reference::swiglu(&a[0], &a[1]),
        shapes: &[&[3, 5, 7], &[3, 5, 7]],
        constants: 0,
    },
    Case {
        name: "gated_add",
        fused: |a| ops::gated_add(&a[0], &a[1], &a[2]),
        plain: |a| reference::gated_add(&a[0], &a[1], &a[2]),
        shapes: &[&[2, 5, 19], &[2, 19], &[2, 5, 19]],
        constants: 0,
    },
    Case {
        name: "gelu",
        fused: |a| ops::gelu(&a[0]),
        plain: |a| reference::gelu(&a[0]),
        shapes: &[&[3, 5, 7]],
        constants: 0,
    },
];

/// The weight in the second argument with the low-rank terms in the arguments after the third.
fn with_terms(a: &[Tensor]) -> Weight {
    let terms = a[3..].chunks_exact(2).zip([0.5, -2.0]);
    let low_rank = terms.map(|(factors, scale)| LowRank { down: factors[0].clone(), up: factors[1].clone(), scale });
    Weight { base: BaseWeight::Dense(a[1].clone()), low_rank: low_rank.collect(), products: ProductPrecision::Full }
}

fn noise(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product();
    let value = |i: usize| 2.0 * ((i * 7919 + seed * 104_729 + 13) as f64 * 0.618).sin();
    let values: Vec<f64> = (0..count).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn arguments(case: &Case, dtype: DType) -> Vec<Tensor> {
    let make = |(seed, shape): (usize, &&[usize])| noise(shape, seed).to_dtype(dtype).unwrap();
    case.shapes.iter().enumerate().map(make).collect()
}

fn elements(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    distance(&elements(got), &elements(want))
}

fn distance(got: &[f64], want: &[f64]) -> f64 {
    let square = |sum: f64, x: f64| sum + x * x;
    let difference = got.iter().zip(want).map(|(a, b)| a - b).fold(0.0, square);
    (difference / want.iter().copied().fold(0.0, square)).sqrt()
}

#[test]
fn forward_matches_the_reference() {
    for case in CASES {
        let exact = (case.plain)(&arguments(case, DType::F64)).unwrap();
        for (dtype, bound) in [(DType::F64, 1e-12), (DType::F32, 1e-6), (DType::BF16, 1e-2), (DType::F16, 2e-3)] {
            let got = (case.fused)(&arguments(case, dtype)).unwrap();
            assert_eq!(got.dtype(), dtype, "{}", case.name);
            let error = relative_error(&got, &exact);
            assert!(error <= bound, "{} in {dtype:?}: {error:e}", case.name);
        }
    }
}

#[test]
fn strided_views_give_the_same() {
    for case in CASES {
        let args = arguments(case, DType::F64);
        let strided =
            |x: &Tensor| Tensor::cat(&[x, x], x.rank() - 1).unwrap().narrow(x.rank() - 1, 0, x.dims()[x.rank() - 1]);
        let views: Vec<Tensor> = args.iter().map(|x| strided(x).unwrap()).collect();
        let error = relative_error(&(case.fused)(&views).unwrap(), &(case.plain)(&args).unwrap());
        assert!(error <= 1e-12, "{}: {error:e}", case.name);
    }
}

/// Σ out · probe.
fn loss(operation: Operation, args: &[Tensor]) -> Tensor {
    let out = operation(args).unwrap();
    let probe = noise(out.dims(), 99).to_dtype(out.dtype()).unwrap();
    (out * probe).unwrap().sum_all().unwrap()
}

fn finite_differences(case: &Case, args: &[Tensor], index: usize) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let values = elements(&args[index]);
    let moved = |element: usize, by: f64| {
        let mut values = values.clone();
        values[element] += by;
        let mut args = args.to_vec();
        args[index] = Tensor::from_vec(values, args[index].shape(), &Device::Cpu).unwrap();
        elements(&loss(case.fused, &args))[0]
    };
    (0..values.len()).map(|i| (moved(i, STEP) - moved(i, -STEP)) / (2.0 * STEP)).collect()
}

#[test]
fn gradients_match_finite_differences() {
    for case in CASES {
        let args = arguments(case, DType::F64);
        for index in 0..args.len() - case.constants {
            let var = Var::from_tensor(&args[index]).unwrap();
            let mut tracked = args.clone();
            tracked[index] = var.as_tensor().clone();
            let gradients = loss(case.fused, &tracked).backward().unwrap();
            let got = gradients.get(&var).unwrap_or_else(|| panic!("{}: argument {index} got no gradient", case.name));
            let error = distance(&elements(got), &finite_differences(case, &args, index));
            assert!(error <= 1e-6, "{} by argument {index}: {error:e}", case.name);
        }
    }
}

#[test]
fn gradients_in_narrow_dtypes_are_near_those_in_f64() {
    let gradients = |case: &Case, dtype: DType| {
        let vars: Vec<Var> = arguments(case, dtype).iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let args: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let store = loss(case.fused, &args).backward().unwrap();
        let count = vars.len() - case.constants;
        vars[..count].iter().map(|var| store.get(var).unwrap().clone()).collect::<Vec<_>>()
    };
    for case in CASES {
        let exact = gradients(case, DType::F64);
        for (dtype, bound) in [(DType::F32, 2e-6), (DType::BF16, 3e-2), (DType::F16, 4e-3)] {
            for (got, want) in gradients(case, dtype).iter().zip(&exact) {
                assert_eq!(got.dtype(), dtype);
                let error = relative_error(got, want);
                assert!(error <= bound, "{} in {dtype:?}: {error:e}", case.name);
            }
        }
    }
}

#[test]
fn frozen_arguments_get_no_gradient() {
    for case in CASES.iter().filter(|case| case.shapes.len() - case.constants > 1) {
        let args = arguments(case, DType::F32);
        for index in 0..args.len() - case.constants {
            let var = Var::from_tensor(&args[index]).unwrap();
            let mut tracked = args.clone();
            tracked[index] = var.as_tensor().clone();
            let gradients = loss(case.fused, &tracked).backward().unwrap();
            for (other, arg) in args.iter().enumerate().filter(|(other, _)| *other != index) {
                assert!(gradients.get(arg).is_none(), "{}: frozen argument {other} got a gradient", case.name);
            }
        }
    }
}

#[test]
fn a_master_weight_in_f32_gets_its_gradient_in_f32() {
    let x = noise(&[4, 6], 1).to_dtype(DType::BF16).unwrap();
    let weight = Var::from_tensor(&noise(&[3, 6], 2).to_dtype(DType::F32).unwrap()).unwrap();
    let bias = Var::from_tensor(&noise(&[3], 3).to_dtype(DType::F32).unwrap()).unwrap();
    let out = ops::dense_linear(&x, &weight, Some(&bias)).unwrap();
    assert_eq!(out.dtype(), DType::BF16);
    let gradients = out.to_dtype(DType::F32).unwrap().sum_all().unwrap().backward().unwrap();
    let want = x.to_dtype(DType::F32).unwrap().sum_keepdim(0).unwrap().broadcast_as((3, 6)).unwrap();
    assert_eq!(gradients.get(&weight).unwrap().dtype(), DType::F32);
    assert!(relative_error(gradients.get(&weight).unwrap(), &want) < 1e-6);
    assert_eq!(elements(gradients.get(&bias).unwrap()), [4.0; 3]);
}

/// Weights of another dtype than the activations are converted where they are used.
#[test]
fn a_master_weight_in_f32_multiplies_as_its_bf16_does() {
    for rows in [4, 20] {
        let x = noise(&[rows, 6], 1).to_dtype(DType::BF16).unwrap();
        let [weight, bias] = [noise(&[3, 6], 2), noise(&[3], 3)].map(|x| x.to_dtype(DType::F32).unwrap());
        let [weight_in_bf16, bias_in_bf16] = [&weight, &bias].map(|x| x.to_dtype(DType::BF16).unwrap());
        let got = ops::dense_linear(&x, &weight, Some(&bias)).unwrap();
        let want = ops::dense_linear(&x, &weight_in_bf16, Some(&bias_in_bf16)).unwrap();
        assert_eq!(elements(&got), elements(&want), "{rows} rows");
    }
}

/// Where the processor multiplies pairs of bf16, results are rounded as much as those of tensors in bf16, and else exact.
#[test]
fn products_in_bf16_leave_activations_in_f32() {
    let [x, w, b, grad] = [&[40, 48][..], &[24, 48], &[24], &[40, 24]].map(|shape| noise(shape, 1));
    let run = |dtype: DType, products: ProductPrecision| {
        let [x, w, b] = [&x, &w, &b].map(|tensor| Var::from_tensor(&tensor.to_dtype(dtype).unwrap()).unwrap());
        let weight = Weight { products, ..Weight::from(w.as_tensor().clone()) };
        let y = ops::linear(&x, &weight, Some(&b)).unwrap();
        assert_eq!(y.dtype(), dtype);
        let store = (&y * grad.to_dtype(dtype).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
        [y.clone(), store.get(&x).unwrap().clone(), store.get(&w).unwrap().clone()].map(|tensor| tensor.detach())
    };
    let exact = run(DType::F64, ProductPrecision::Full);
    let rounded = run(DType::F32, ProductPrecision::Bf16);
    let bf16 = run(DType::BF16, ProductPrecision::Full);
    for ((exact, rounded), bf16) in exact.iter().zip(&rounded).zip(&bf16) {
        let [error, usual] = [rounded, bf16].map(|tensor| relative_error(tensor, exact));
        assert!(error <= usual, "{error:e}, in bf16 {usual:e}");
        assert_eq!(error > 1e-5, ops::has_bf16_products(), "{error:e}");
    }
}

#[test]
fn other_arguments_than_x_may_have_another_dtype() {
    let is_converted = |case: &Case, index: usize| index > 0 && !(case.name == "gated_add" && index == 2);
    for case in CASES.iter().filter(|case| case.shapes.len() > 1) {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let args = arguments(case, dtype);
            let widened = args.iter().enumerate().map(|(index, x)| match is_converted(case, index) {
                true => x.to_dtype(DType::F64),
                false => Ok(x.clone()),
            });
            let widened: Vec<Tensor> = widened.collect::<Result<_>>().unwrap();
            for operation in [case.fused, case.plain] {
                let got = operation(&widened).unwrap();
                let want = operation(&args).unwrap();
                assert_eq!(got.dtype(), dtype, "{}", case.name);
                let error = relative_error(&got, &want);
                assert!(
                    error <= if dtype == DType::F32 { 1e-6 } else { 1e-2 },
                    "{} in {dtype:?}: {error:e}",
                    case.name
                );
            }
        }
    }
}

#[test]
fn a_product_over_no_inputs_is_the_bias() {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let empty = |shape: &[usize]| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        let bias = noise(&[2], 1).to_dtype(dtype).unwrap();
        let want = bias.broadcast_as((3, 2)).unwrap().contiguous().unwrap();
        for (bias, want) in [(Some(&bias), want), (None, empty(&[3, 2]))] {
            let got = ops::dense_linear(&empty(&[3, 0]), &empty(&[2, 0]), bias).unwrap();
            assert_eq!((got.dims(), elements(&got)), (&[3, 2][..], elements(&want)), "{dtype:?}");
        }
        assert_eq!(ops::dense_linear(&empty(&[2, 0, 4]), &empty(&[5, 4]), None).unwrap().dims(), [2, 0, 5]);
        assert_eq!(ops::dense_linear(&empty(&[2, 4]), &empty(&[0, 4]), Some(&empty(&[0]))).unwrap().dims(), [2, 0]);
        let x = Var::from_tensor(&empty(&[3, 0])).unwrap();
        let weight = Var::from_tensor(&empty(&[2, 0])).unwrap();
        let gradients = ops::dense_linear(&x, &weight, None).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&x).unwrap().dims(), [3, 0]);
        assert_eq!(gradients.get(&weight).unwrap().dims(), [2, 0]);
    }
}

/// Enough rows and channels for products of bf16 pairs where the processor has them. The bound is twice the error of
/// the reference in bf16.
#[test]
fn gradients_of_large_products_in_bf16_are_as_accurate_as_the_reference() {
    let gradients = |dtype: DType, linear: Operation| {
        let rounded =
            |shape: &[usize], seed| noise(shape, seed).to_dtype(DType::BF16).unwrap().to_dtype(dtype).unwrap();
        let vars = [rounded(&[2, 70, 67], 1), rounded(&[45, 67], 2)].map(|x| Var::from_tensor(&x).unwrap());
        let store = loss(linear, &[vars[0].as_tensor().clone(), vars[1].as_tensor().clone()]).backward().unwrap();
        vars.map(|var| store.get(&var).unwrap().clone())
    };
    let fused: Operation = |a| ops::dense_linear(&a[0], &a[1], None);
    let plain: Operation = |a| reference::dense_linear(&a[0], &a[1], None);
    let exact = gradients(DType::F64, plain);
    let pairs = gradients(DType::BF16, fused).into_iter().zip(gradients(DType::BF16, plain)).zip(&exact);
    for ((fused, plain), exact) in pairs {
        let fused = relative_error(&fused, exact);
        let plain = relative_error(&plain, exact);
        assert!(fused <= 2.0 * plain + 1e-6, "{fused:e}, reference {plain:e}");
    }
}

#[test]
fn contradicting_shapes_are_errors() {
    for case in CASES.iter().filter(|case| case.shapes.len() > 1) {
        let mut args = arguments(case, DType::F32);
        args[1] = noise(&[1, 1], 0).to_dtype(DType::F32).unwrap();
        assert!((case.fused)(&args).is_err(), "{}", case.name);
    }
}

/// More values than one task has, and both gradients.
#[test]
fn a_sum_is_that_of_the_tensor_library() {
    for dtype in [DType::BF16, DType::F32] {
        let [a, b] = [1, 2].map(|seed| Var::from_tensor(&noise(&[3, 70, 97], seed).to_dtype(dtype).unwrap()).unwrap());
        let sum = ops::add(&a, &b).unwrap();
        let [a, b] = [&a, &b].map(|tensor| tensor.as_detached_tensor().to_dtype(DType::F32).unwrap());
        let want = (&a + &b).unwrap().to_dtype(dtype).unwrap();
        assert_eq!(relative_error(&sum, &want), 0.0);
    }
    let [a, b] = [1, 2].map(|seed| Var::from_tensor(&noise(&[5, 6], seed).to_dtype(DType::BF16).unwrap()).unwrap());
    let gradients = ops::add(&a, &b).unwrap().sum_all().unwrap().backward().unwrap();
    for tensor in [&a, &b] {
        assert_eq!(
            gradients.get(tensor).unwrap().to_dtype(DType::F32).unwrap().mean_all().unwrap().to_vec0::<f32>().unwrap(),
            1.0
        );
    }
}

#[test]
fn gelu_is_right_far_from_zero() {
    let x = Tensor::new(&[-1e4f32, -30.0, -5.0, 0.0, 5.0, 30.0, 1e4], &Device::Cpu).unwrap();
    let got = ops::gelu(&x).unwrap().to_vec1::<f32>().unwrap();
    assert!(got[0].abs() < 1e-33 && got[1].abs() < 1e-33, "{got:?}");
    assert_eq!(got[3..], [0.0, 5.0 - 2.291_796_2e-7, 30.0, 1e4]);
    assert!((got[2] / -2.291_796_2e-7 - 1.0).abs() < 1e-5, "{:e}", got[2]);
}

/// Bands of an image that is wider and one that is narrower than a band, and kernels that reach over the border.
#[test]
fn convolutions_are_those_of_the_tensor_library() {
    for (image, kernel) in
        [([2, 4, 6, 7], 5), ([1, 3, 5, 600], 3), ([2, 2, 40, 30], 3), ([1, 5, 4, 4], 1), ([1, 1, 1, 2], 5)]
    {
        let x = noise(&image, 1).to_dtype(DType::F32).unwrap();
        let weight = noise(&[3, image[1], kernel, kernel], 2).to_dtype(DType::F32).unwrap();
        let bias = noise(&[3], 3);
        let want = x.conv2d(&weight, kernel / 2, 1, 1, 1).unwrap();
        let want = want.broadcast_add(&bias.to_dtype(DType::F32).unwrap().reshape((1, 3, 1, 1)).unwrap()).unwrap();
        for (dtype, bound) in [(DType::F32, 1e-6), (DType::BF16, 1e-2), (DType::F64, 1e-6)] {
            let got = ops::convolution(&x.to_dtype(dtype).unwrap(), &weight, Some(&bias)).unwrap();
            assert_eq!(got.dtype(), dtype);
            let error = relative_error(&got, &want);
            assert!(error <= bound, "{image:?}, kernel {kernel} in {dtype:?}: {error:e}");
        }
    }
}

/// Sizes with whole and cut tiles, one and several blocks, both of a few rows and of part of a row.
const IMAGES: [[usize; 4]; 6] =
    [[2, 4, 6, 7], [1, 3, 5, 1100], [1, 40, 33, 50], [1, 2, 1, 1], [1, 1, 2, 3], [1, 300, 4, 270]];

#[test]
fn an_activated_convolution_is_that_of_the_activated_image() {
    for image in IMAGES {
        let [batch, channels, height, width] = image;
        let f32 = |shape: &[usize], seed| noise(shape, seed).to_dtype(DType::F32).unwrap();
        let (x, weight, bias) = (f32(&image, 1), f32(&[5, channels, 3, 3], 2), f32(&[5], 3));
        let residual = f32(&[batch, 5, height, width], 4);
        let values = |seed| f32(&[batch * channels], seed).to_vec1::<f32>().unwrap();
        let activation = ops::ChannelAffine { scales: values(5), shifts: values(6) };
        let activated = ops::reference::channel_affine(&x, &activation).unwrap().silu().unwrap();
        let want = activated.conv2d(&weight, 1, 1, 1, 1).unwrap();
        let want = (want.broadcast_add(&bias.reshape((1, 5, 1, 1)).unwrap()).unwrap() + &residual).unwrap();
        for (dtype, bound) in [(DType::F32, 2e-6), (DType::BF16, 2e-2), (DType::F64, 2e-6)] {
            let [x, residual] = [&x, &residual].map(|tensor| tensor.to_dtype(dtype).unwrap());
            let got = ops::activated_convolution(&x, &activation, &weight, Some(&bias), Some(&residual)).unwrap();
            let error = relative_error(&got, &want);
            assert!(got.dtype() == dtype && error <= bound, "{image:?} in {dtype:?}: {error:e}");
        }
    }
}

#[test]
fn an_upsampled_convolution_is_that_of_the_enlarged_image() {
    for image in IMAGES {
        let f32 = |shape: &[usize], seed| noise(shape, seed).to_dtype(DType::F32).unwrap();
        let (x, weight, bias) = (f32(&image, 1), f32(&[5, image[1], 3, 3], 2), f32(&[5], 3));
        let enlarged = x.upsample_nearest2d(2 * image[2], 2 * image[3]).unwrap();
        let want = enlarged.conv2d(&weight, 1, 1, 1, 1).unwrap();
        let want = want.broadcast_add(&bias.reshape((1, 5, 1, 1)).unwrap()).unwrap();
        let got = ops::upsampled_convolution(&x, &weight, Some(&bias)).unwrap();
        let error = relative_error(&got, &want);
        assert!(error <= 2e-6, "{image:?}: {error:e}");
    }
}

/// The error is a few times what rounding the image to bf16 costs alone; bias, residual and result are f32.
#[test]
fn a_weight_in_bf16_rounds_what_is_multiplied() {
    for image in IMAGES {
        let [batch, channels, height, width] = image;
        let f32 = |shape: &[usize], seed| noise(shape, seed).to_dtype(DType::F32).unwrap();
        let (x, bias, residual) = (f32(&image, 1), f32(&[17], 3), f32(&[batch, 17, height, width], 4));
        let weight = f32(&[17, channels, 3, 3], 2).to_dtype(DType::BF16).unwrap();
        let activation =
            ops::ChannelAffine { scales: vec![1.5; batch * channels], shifts: vec![0.1; batch * channels] };
        let of = |x: &Tensor, weight: &Tensor| {
            let activated = ops::activated_convolution(x, &activation, weight, Some(&bias), Some(&residual));
            let upsampled = ops::upsampled_convolution(x, weight, Some(&bias));
            [ops::convolution(x, weight, Some(&bias)), activated, upsampled].map(Result::unwrap)
        };
        let widened = weight.to_dtype(DType::F32).unwrap();
        let wanted = of(&x, &widened);
        let of_rounded = of(&x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap(), &widened);
        for ((got, want), rounded) in of(&x, &weight).iter().zip(&wanted).zip(&of_rounded) {
            let [error, usual] = [got, rounded].map(|found| relative_error(found, want));
            assert!(got.dtype() == DType::F32 && error < 16.0 * usual, "{image:?}: {error:e}, {usual:e}");
            assert!(error > 0.1 * usual || !ops::has_bf16_products(), "{image:?}: {error:e}, {usual:e}");
        }
    }
}

/// Moments of two halves of an image together are those of the whole, and what they do to channels is the group norm.
#[test]
fn joined_moments_give_the_group_norm() {
    let x = (noise(&[2, 6, 8, 5], 1) * 3.0).unwrap().affine(1.0, 40.0).unwrap().to_dtype(DType::F32).unwrap();
    let [weight, bias] = [2, 3].map(|seed| noise(&[6], seed).to_dtype(DType::F32).unwrap());
    let half = |first, rows| ops::GroupMoments::of(&x.narrow(2, first, rows).unwrap(), 3).unwrap();
    let joined = half(0, 3).and(&half(3, 5)).unwrap();
    let affine = joined.affine(&weight, &bias, 1e-6).unwrap();
    let got = ops::reference::channel_affine(&x, &affine).unwrap();
    let want = ops::reference::group_norm(&x.to_dtype(DType::F64).unwrap(), 3, &weight, &bias, 1e-6).unwrap();
    let error = relative_error(&got, &want);
    assert!(error < 3e-6, "{error:e}");
    assert!(half(0, 3).and(&ops::GroupMoments::of(&x, 2).unwrap()).is_err());
}

/// Fewer and more queries and keys than a block has, and scores far apart.
#[test]
fn wide_attention_is_softmax_attention() {
    for ([batch, queries, keys, channels], spread) in
        [([2, 3, 5, 7], 1.0), ([1, 130, 4100, 24], 4.0), ([1, 300, 33, 64], 30.0), ([1, 1, 1, 1], 1.0)]
    {
        let f32 = |count, seed| noise(&[batch, count, channels], seed).to_dtype(DType::F32).unwrap();
        let (query, key, value) = ((f32(queries, 1) * spread).unwrap(), f32(keys, 2), f32(keys, 3));
        let scores = (query.matmul(&key.t().unwrap()).unwrap() / (channels as f64).sqrt()).unwrap();
        let weights = scores.broadcast_sub(&scores.max_keepdim(2).unwrap()).unwrap().exp().unwrap();
        let weights = weights.broadcast_div(&weights.sum_keepdim(2).unwrap()).unwrap();
        let want = weights.matmul(&value).unwrap();
        let error = relative_error(&ops::wide_attention(&query, &key, &value).unwrap(), &want);
        assert!(error < 3e-6, "{batch} x {queries} x {keys} x {channels}: {error:e}");
    }
    let empty = noise(&[1, 0, 4], 1);
    assert!(ops::wide_attention(&noise(&[1, 2, 4], 1), &empty, &empty).is_err());
}

/// In every format, for few rows of x and for many, with and without a bias.
#[test]
fn a_quantised_weight_multiplies_as_what_it_stands_for() {
    let (inputs, outputs) = (256, 75);
    let weight = noise(&[outputs, inputs], 1).to_dtype(DType::F32).unwrap();
    let blocks = [GgmlDType::Q4_0, GgmlDType::Q5_1, GgmlDType::Q8_0, GgmlDType::Q3K, GgmlDType::Q4K, GgmlDType::Q6K];
    let of_blocks = |format: GgmlDType| {
        let bytes = QTensor::quantize(&weight, format).unwrap().data().unwrap().to_vec();
        QuantizedMatrix::new(QuantizedFormat::Blocks(format), [outputs, inputs], bytes, Vec::new()).unwrap()
    };
    let bytes = (0..outputs * inputs).map(|index| (index * 89 % 112) as u8).collect();
    let scales = (0..outputs).map(|row| 0.1 + row as f32 / 50.0).collect();
    let fp8 = QuantizedMatrix::new(QuantizedFormat::Fp8(Fp8::E4M3), [outputs, inputs], bytes, scales).unwrap();
    for matrix in blocks.map(of_blocks).into_iter().chain([fp8]) {
        let plain = Weight::from(matrix.to_tensor().unwrap());
        let format = matrix.format();
        let quantised = Weight::from(matrix);
        for (dtype, bound) in [(DType::F32, 2e-6), (DType::BF16, 6e-3)] {
            for rows in [1, 8, 9, 130] {
                let x = noise(&[2, rows, inputs], 3).to_dtype(dtype).unwrap();
                let bias = noise(&[outputs], 4).to_dtype(DType::F32).unwrap();
                for bias in [None, Some(&bias)] {
                    let got = ops::linear(&x, &quantised, bias).unwrap();
                    let exact = bias.map(|bias| bias.to_dtype(DType::F32).unwrap());
                    let want = reference::linear(&x.to_dtype(DType::F32).unwrap(), &plain, exact.as_ref()).unwrap();
                    let error = relative_error(&got, &want);
                    assert!(error < bound && got.dtype() == dtype, "{format:?}, {dtype:?}, {rows} rows: {error}");
                    let known = reference::linear(&x.to_dtype(DType::F32).unwrap(), &quantised, exact.as_ref());
                    assert_eq!(relative_error(&known.unwrap(), &want), 0.0);
                }
            }
        }
    }
}
