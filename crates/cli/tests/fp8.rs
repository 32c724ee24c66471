//! FLUX in fp8, plain and scaled, through the commands: what comes out is what the stored numbers times their scales give.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::fixture;
use clearform_weights::{Dtype, InMemoryTensors, RawTensor, TensorInfo, TensorSource, WeightsError, save};
use common::{Tiny, complaint, json, repository, run, text};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

#[derive(Clone, Default)]
struct Raw(BTreeMap<String, RawTensor>);

impl TensorSource for Raw {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.keys().filter_map(|name| self.info(name)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let RawTensor { dtype, shape, .. } = self.0.get(name)?;
        Some(TensorInfo { name: name.to_owned(), dtype: *dtype, shape: shape.clone() })
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        self.0.get(name).cloned().ok_or_else(|| WeightsError::Missing { name: name.to_owned() })
    }
}

impl Raw {
    fn put(&mut self, name: String, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.0.insert(name, RawTensor { dtype, shape: shape.to_vec(), bytes });
    }

    fn put_tensor(&mut self, name: &str, tensor: Tensor) {
        let raw = InMemoryTensors::from_iter([(name.to_owned(), tensor)]).read(name).unwrap();
        self.0.insert(name.to_owned(), raw);
    }
}

/// A way in which files hold fp8.
struct Form {
    layout: &'static str,
    dtype: Dtype,
    /// The ending of the scale's name, and whether there is one for each row.
    scale: Option<(&'static str, Rows)>,
    /// Whether descriptions and markers stand beside.
    beside: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq)]
enum Rows {
    Together,
    Apart,
}

/// (the stored bytes, the scales, their product in bf16) of a matrix.
fn quantise(weight: &Tensor, form: &Form) -> (Vec<u8>, Tensor, Tensor) {
    let (rows, _) = weight.dims2().unwrap();
    let largest = match form.scale {
        Some((_, Rows::Apart)) => weight.abs().unwrap().max_keepdim(1).unwrap(),
        _ => weight.abs().unwrap().max_all().unwrap().reshape((1, 1)).unwrap(),
    };
    // Scales of 20 bits make the products exact in f32, so that they are rounded but once.
    let scale =
        |largest: f32| if form.scale.is_none() { 1.0 } else { f32::from_bits((largest / 400.0).to_bits() & !0xf) };
    let scales: Vec<f32> = largest.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(scale).collect();
    let scales = Tensor::from_vec(scales, largest.shape(), &Device::Cpu).unwrap();
    let (bytes, numbers) = narrowed(&weight.broadcast_div(&scales).unwrap(), form.dtype);
    let product = numbers.broadcast_mul(&scales).unwrap().to_dtype(DType::BF16).unwrap();
    let shape = if scales.elem_count() == 1 { vec![] } else { vec![rows, 1] };
    (bytes, scales.reshape(shape).unwrap(), product)
}

/// The bytes of numbers in fp8, and what they stand for in f32, both by the tensor library.
fn narrowed(numbers: &Tensor, dtype: Dtype) -> (Vec<u8>, Tensor) {
    if dtype == Dtype::F8_E4M3 {
        let stored = numbers.to_dtype(DType::F8E4M3).unwrap();
        let bytes = InMemoryTensors::from_iter([("w".to_owned(), stored.clone())]).read("w").unwrap().bytes;
        return (bytes, stored.to_dtype(DType::F32).unwrap());
    }
    let halves = numbers.to_dtype(DType::F16).unwrap();
    let halves = InMemoryTensors::from_iter([("w".to_owned(), halves)]).read("w").unwrap().bytes;
    let bytes: Vec<u8> = halves.chunks(2).map(|half| half[1]).collect();
    let halves: Vec<u8> = bytes.iter().flat_map(|byte| [0, *byte]).collect();
    let stored = Tensor::from_raw_buffer(&halves, DType::F16, numbers.dims(), &Device::Cpu).unwrap();
    (bytes, stored.to_dtype(DType::F32).unwrap())
}

/// The tiny FLUX with its matrices in `form`, and the same with their products in their place. Gives how many they are.
fn files(form: &Form, folder: &Path) -> (PathBuf, PathBuf, usize) {
    let tiny = Tiny::new();
    let plain = folder.join("plain.safetensors");
    run(0, &["export", text(tiny.path()), "--to", form.layout, "-o", text(&plain)]);
    let (mut scaled, mut products, mut count) = (Raw::default(), InMemoryTensors::default(), 0);
    for (name, tensor) in fixture(&plain) {
        let Some(module) = name.strip_suffix("weight").filter(|_| tensor.rank() == 2) else {
            scaled.put_tensor(&name, tensor.clone());
            products.insert(name, tensor);
            continue;
        };
        count += 1;
        let (bytes, scales, product) = quantise(&tensor, form);
        scaled.put(name.clone(), form.dtype, tensor.dims(), bytes);
        if let Some((ending, _)) = form.scale {
            scaled.put_tensor(&format!("{module}{ending}"), scales);
        }
        for ending in form.beside {
            let name = format!("{module}{ending}");
            match *ending {
                "comfy_quant" => scaled.put(name, Dtype::U8, &[27], br#"{"format": "float8_e4m3fn"}"#.to_vec()),
                _ => scaled.put(name, Dtype::F32, &[], 0.25f32.to_le_bytes().to_vec()),
            }
        }
        products.insert(name, product);
    }
    let (source, reference) = (folder.join("fp8.safetensors"), folder.join("products.safetensors"));
    if form.scale.is_some_and(|(ending, _)| ending == "scale_weight") {
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
    let paths = ["forward", text(model), "--inputs", text(&input), "-o", text(&output), "--attention", "full"];
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
    let note = format!("{count} tensors are fp8 and read as bf16, {scaled} of them times their scales");
    assert!(found["notes"].as_array().unwrap().contains(&note.into()), "{}", found["notes"]);

    let wanted = sample(&reference, &reading, folder.path());
    assert!(wanted.iter().all(|number| number.is_finite()) && wanted.iter().any(|number| *number != 0.0));
    assert_eq!(sample(&source, &reading, folder.path()), wanted);
    let convert = |from: &Path, to: &Path| {
        run(0, &[&["convert", text(from), "-o", text(to), "--radius", "3", "--no-distill"], &reading[..]].concat());
        std::fs::read(to.join("transformer/diffusion_pytorch_model.safetensors")).unwrap()
    };
    assert!(convert(&source, &path("model")) == convert(&reference, &path("other")), "the models differ");
    assert_eq!(sample(&path("model"), &[], folder.path()), wanted);
}

#[test]
fn plain_fp8_is_what_its_bytes_say() {
    for (layout, dtype) in [("comfy", Dtype::F8_E4M3), ("bfl", Dtype::F8_E5M2), ("diffusers", Dtype::F8_E4M3)] {
        check(&Form { layout, dtype, scale: None, beside: &[] });
    }
}

#[test]
fn scaled_fp8_of_comfy_is_multiplied_out() {
    let scale = Some(("scale_weight", Rows::Together));
    for dtype in [Dtype::F8_E4M3, Dtype::F8_E5M2] {
        check(&Form { layout: "comfy", dtype, scale, beside: &["scale_input"] });
    }
}

#[test]
fn newer_scales_are_multiplied_out() {
    let dtype = Dtype::F8_E4M3;
    let rows = Some(("weight_scale", Rows::Apart));
    check(&Form { layout: "bfl", dtype, scale: rows, beside: &["comfy_quant", "input_scale"] });
    check(&Form { layout: "diffusers", dtype, scale: rows, beside: &[] });
    let one = Some(("weight_scale", Rows::Together));
    check(&Form { layout: "comfy", dtype, scale: one, beside: &["comfy_quant"] });
}

#[test]
fn other_formats_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let form = Form { layout: "comfy", dtype: Dtype::F8_E4M3, scale: None, beside: &[] };
    let (source, _, _) = files(&form, folder.path());
    let mut tensors = Raw::default();
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
            let said = complaint(1, &command);
            assert!(said.contains(expected) && said.contains("give the bf16"), "{name}: {said}");
        }
        assert!(!model.exists());
    }
}
