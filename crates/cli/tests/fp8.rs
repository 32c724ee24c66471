//! FLUX in fp8, plain and scaled, through the commands: results are those of the stored values times their scales.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::fixture;
use clearform_weights::{Dtype, InMemoryTensors, TensorSource, save};
use common::{RawTensors, Tiny, json, repository, run, stderr_of, text};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// A convention for storing fp8.
struct Form {
    layout: &'static str,
    dtype: Dtype,
    /// The suffix of the scale's name, and what one scale covers.
    scale: Option<(&'static str, Granularity)>,
    /// Suffixes of further tensors per matrix: descriptions and input scales.
    extra: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq)]
enum Granularity {
    Matrix,
    Row,
}

/// Quantises a matrix to (the stored bytes, the scales, their product in bf16).
fn quantise(weight: &Tensor, form: &Form) -> (Vec<u8>, Tensor, Tensor) {
    let (rows, _) = weight.dims2().unwrap();
    let largest = match form.scale {
        Some((_, Granularity::Row)) => weight.abs().unwrap().max_keepdim(1).unwrap(),
        _ => weight.abs().unwrap().max_all().unwrap().reshape((1, 1)).unwrap(),
    };
    // Scales with 20-bit mantissas make the products exact in f32, so that they are rounded only once, to bf16.
    let scale =
        |largest: f32| if form.scale.is_none() { 1.0 } else { f32::from_bits((largest / 400.0).to_bits() & !0xf) };
    let scales: Vec<f32> = largest.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(scale).collect();
    let scales = Tensor::from_vec(scales, largest.shape(), &Device::Cpu).unwrap();
    let (bytes, values) = to_fp8(&weight.broadcast_div(&scales).unwrap(), form.dtype);
    let product = values.broadcast_mul(&scales).unwrap().to_dtype(DType::BF16).unwrap();
    let shape = if scales.elem_count() == 1 { vec![] } else { vec![rows, 1] };
    (bytes, scales.reshape(shape).unwrap(), product)
}

/// Rounds to fp8 with candle: the bytes, and their values in f32.
fn to_fp8(values: &Tensor, dtype: Dtype) -> (Vec<u8>, Tensor) {
    if dtype == Dtype::F8_E4M3 {
        let stored = values.to_dtype(DType::F8E4M3).unwrap();
        let bytes = InMemoryTensors::from_iter([("w".to_owned(), stored.clone())]).read("w").unwrap().bytes;
        return (bytes, stored.to_dtype(DType::F32).unwrap());
    }
    // The upper byte of an f16 is an F8_E5M2.
    let halves = values.to_dtype(DType::F16).unwrap();
    let halves = InMemoryTensors::from_iter([("w".to_owned(), halves)]).read("w").unwrap().bytes;
    let bytes: Vec<u8> = halves.chunks(2).map(|half| half[1]).collect();
    let halves: Vec<u8> = bytes.iter().flat_map(|byte| [0, *byte]).collect();
    let stored = Tensor::from_raw_buffer(&halves, DType::F16, values.dims(), &Device::Cpu).unwrap();
    (bytes, stored.to_dtype(DType::F32).unwrap())
}

/// Writes the tiny FLUX with its matrices in `form`, and again with the matrices' values in bf16. Returns both paths
/// and the number of matrices.
fn files(form: &Form, folder: &Path) -> (PathBuf, PathBuf, usize) {
    let tiny = Tiny::new();
    let plain = folder.join("plain.safetensors");
    run(0, &["export", text(tiny.path()), "--to", form.layout, "-o", text(&plain)]);
    let (mut scaled, mut products, mut count) = (RawTensors::default(), InMemoryTensors::default(), 0);
    for (name, tensor) in fixture(&plain) {
        let Some(module) = name.strip_suffix("weight").filter(|_| tensor.rank() == 2) else {
            scaled.put_tensor(&name, tensor.clone());
            products.insert(name, tensor);
            continue;
        };
        count += 1;
        let (bytes, scales, product) = quantise(&tensor, form);
        scaled.put(name.clone(), form.dtype, tensor.dims(), bytes);
        if let Some((suffix, _)) = form.scale {
            scaled.put_tensor(&format!("{module}{suffix}"), scales);
        }
        for suffix in form.extra {
            let name = format!("{module}{suffix}");
            match *suffix {
                "comfy_quant" => scaled.put(name, Dtype::U8, &[27], br#"{"format": "float8_e4m3fn"}"#.to_vec()),
                _ => scaled.put(name, Dtype::F32, &[], 0.25f32.to_le_bytes().to_vec()),
            }
        }
        products.insert(name, product);
    }
    let (source, reference) = (folder.join("fp8.safetensors"), folder.join("products.safetensors"));
    if form.scale.is_some_and(|(suffix, _)| suffix == "scale_weight") {
        scaled.put("model.diffusion_model.scaled_fp8".to_owned(), form.dtype, &[0], Vec::new());
    }
    save(&source, &scaled, &BTreeMap::new()).unwrap();
    save(&reference, &products, &BTreeMap::new()).unwrap();
    (source, reference, count)
}

fn sample(model: &Path, reading: &[&str], folder: &Path) -> Vec<f32> {
    let cases = fixture(repository("tests/fixtures/flux/head24/cases.safetensors"));
    let inputs = cases.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("5x8/input/")?, tensor.clone())));
    let inputs: HashMap<String, Tensor> = inputs.map(|(name, tensor)| (name.to_owned(), tensor)).collect();
    let (input, output) = (folder.join("in.safetensors"), folder.join("out.safetensors"));
    candle_core::safetensors::save(&inputs, &input).unwrap();
    let paths =
        ["forward", text(model), "--inputs", text(&input), "-o", text(&output), "--overwrite", "--attention", "full"];
    run(0, &[&paths[..], reading].concat());
    fixture(&output)["sample"].flatten_all().unwrap().to_vec1().unwrap()
}

fn check(form: &Form) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (source, reference, count) = files(form, folder.path());
    let config = repository("tests/fixtures/flux/head24/config.json");
    let reading = ["--config", text(&config)];
    let found = json(0, &[&["inspect", text(&source)], &reading[..]].concat());
    assert_eq!((&found["complete"], &found["layout"]), (&true.into(), &form.layout.into()));
    assert_eq!(
        found["dtypes"]["BF16"],
        json(0, &[&["inspect", text(&reference)], &reading[..]].concat())["dtypes"]["BF16"]
    );
    let scaled = if form.scale.is_some() { count } else { 0 };
    let note = format!("{count} tensors are in fp8, {scaled} of them with scales");
    assert!(found["notes"].as_array().unwrap().contains(&note.into()), "{}", found["notes"]);

    let wanted = sample(&reference, &reading, folder.path());
    assert!(wanted.iter().all(|value| value.is_finite()) && wanted.iter().any(|value| *value != 0.0));
    // In f32 the sums of a weight that stays fp8 are those of its parts.
    let of_source = sample(&source, &reading, folder.path());
    let error = of_source.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error < 2e-6 * wanted.iter().fold(0.0, |largest, value| value.abs().max(largest)), "{error}");
    let convert = |from: &Path, to: &Path| {
        run(0, &[&["convert", text(from), "-o", text(to), "--radius", "3", "--no-distill"], &reading[..]].concat());
        std::fs::read(to.join("transformer/diffusion_pytorch_model.safetensors")).unwrap()
    };
    assert!(convert(&source, &path("model")) == convert(&reference, &path("other")), "the models differ");
    assert_eq!(sample(&path("model"), &[], folder.path()), wanted);
}

#[test]
fn plain_fp8_is_read_exactly() {
    for (layout, dtype) in [("comfy", Dtype::F8_E4M3), ("bfl", Dtype::F8_E5M2), ("diffusers", Dtype::F8_E4M3)] {
        check(&Form { layout, dtype, scale: None, extra: &[] });
    }
}

#[test]
fn scaled_fp8_of_comfyui_is_dequantized() {
    let scale = Some(("scale_weight", Granularity::Matrix));
    for dtype in [Dtype::F8_E4M3, Dtype::F8_E5M2] {
        check(&Form { layout: "comfy", dtype, scale, extra: &["scale_input"] });
    }
}

#[test]
fn newer_scale_names_are_dequantized() {
    let dtype = Dtype::F8_E4M3;
    let rows = Some(("weight_scale", Granularity::Row));
    check(&Form { layout: "bfl", dtype, scale: rows, extra: &["comfy_quant", "input_scale"] });
    check(&Form { layout: "diffusers", dtype, scale: rows, extra: &[] });
    let matrix = Some(("weight_scale", Granularity::Matrix));
    check(&Form { layout: "comfy", dtype, scale: matrix, extra: &["comfy_quant"] });
}

#[test]
fn other_quantisations_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let form = Form { layout: "comfy", dtype: Dtype::F8_E4M3, scale: None, extra: &[] };
    let (source, _, _) = files(&form, folder.path());
    let mut tensors = RawTensors::default();
    let file = clearform_weights::Checkpoint::open(&source).unwrap();
    file.tensors().iter().for_each(|info| drop(tensors.0.insert(info.name.clone(), file.read(&info.name).unwrap())));
    let description = br#"{"format": "int8_tensorwise"}"#;
    let module = "model.diffusion_model.double_blocks.0.img_attn.qkv";
    for (expected, name, dtype, bytes) in [
        ("int8_tensorwise", "comfy_quant", Dtype::U8, description.to_vec()),
        ("scaled by blocks", "weight_scale_inv", Dtype::F32, vec![0; 4]),
        ("expected one scale or one for each", "weight_scale", Dtype::F32, vec![0; 12]),
        ("bitsandbytes", "weight.quant_state.bitsandbytes__nf4", Dtype::U8, vec![0; 4]),
        ("SVDQuant", "wscales", Dtype::BF16, vec![0; 4]),
    ] {
        let mut tensors = tensors.clone();
        let count = bytes.len() / (dtype.bitsize() / 8);
        tensors.put(format!("{module}.{name}"), dtype, &[count], bytes);
        save(&source, &tensors, &BTreeMap::new()).unwrap();
        let model = folder.path().join("model");
        for command in
            [vec!["inspect", text(&source)], vec!["convert", text(&source), "--no-distill", "-o", text(&model)]]
        {
            let message = stderr_of(1, &command);
            assert!(message.contains(expected) && message.contains("use the bf16"), "{name}: {message}");
        }
        assert!(!model.exists());
    }
}
