//! fp8 weights, with and without scales: the values that they are presented as, the outcome of their scales, and what
//! is refused.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_layout::{Dequantized, Hints, Inspection, detect};
use clearform_weights::{Dtype, RawTensor, Result, TensorInfo, TensorSource, WeightsError, save};
use common::{TINY, manifests};
use std::collections::BTreeMap;

const ROWS: usize = 6;
const COLUMNS: usize = 5;

/// Tensors in memory, in any dtype.
#[derive(Debug, Clone, Default)]
struct Raw(BTreeMap<String, RawTensor>);

impl Raw {
    fn with(mut self, name: &str, (dtype, shape, bytes): (Dtype, &[usize], Vec<u8>)) -> Self {
        self.0.insert(name.to_owned(), RawTensor { dtype, shape: shape.to_vec(), bytes });
        self
    }
}

impl TensorSource for Raw {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.keys().filter_map(|name| self.info(name)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let RawTensor { dtype, shape, .. } = self.0.get(name)?;
        Some(TensorInfo { name: name.to_owned(), dtype: *dtype, shape: shape.clone() })
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        self.0.get(name).cloned().ok_or_else(|| WeightsError::Missing { name: name.to_owned() })
    }
}

/// Pseudo-random numbers.
fn noise(seed: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(seed * 2 + 1), |state| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)))
}

fn bytes(seed: u32, count: usize) -> Vec<u8> {
    noise(seed).skip(1).take(count).map(|state| (state >> 24) as u8).collect()
}

/// Scales of 20 bits, so that their products with fp8 are exact in f32.
fn scales(seed: u32, count: usize) -> Vec<f32> {
    let scale = |state: u32| f32::from_bits((0x3a00_0000 + (state >> 6)) & !0xf);
    noise(seed).skip(1).take(count).map(scale).collect()
}

fn f32s(shape: &[usize], values: &[f32]) -> (Dtype, Vec<usize>, Vec<u8>) {
    (Dtype::F32, shape.to_vec(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

/// The values of `stored` according to candle; an E5M2 is the upper byte of an f16.
fn values(dtype: Dtype, stored: &[u8]) -> Vec<f32> {
    let halves: Vec<u8> = stored.iter().flat_map(|byte| [0, *byte]).collect();
    let (dtype, bytes) = if dtype == Dtype::F8_E4M3 { (DType::F8E4M3, stored) } else { (DType::F16, &halves[..]) };
    let tensor = Tensor::from_raw_buffer(bytes, dtype, &[stored.len()], &Device::Cpu).unwrap();
    tensor.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// The weight times its scale or its scales per row, in bf16.
fn products(dtype: Dtype, stored: &[u8], scales: &[f32]) -> Vec<u8> {
    let scale = |at: usize| scales[if scales.len() == 1 { 0 } else { at / COLUMNS }];
    let exact = values(dtype, stored).into_iter().enumerate().map(|(at, value)| value * scale(at));
    let bf16 = Tensor::from_iter(exact, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    clearform_weights::InMemoryTensors::from_iter([("w".to_owned(), bf16)]).read("w").unwrap().bytes
}

fn is_nan(bf16: &[u8]) -> bool {
    u16::from_le_bytes([bf16[0], bf16[1]]) & 0x7fff > 0x7f80
}

/// Equal bit for bit, except for the payloads of NaN.
fn assert_same(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.chunks(2).zip(expected.chunks(2)).enumerate() {
        assert!(found == expected || is_nan(found) && is_nan(expected), "{what}: element {at}");
    }
}

type Companion = (&'static str, (Dtype, Vec<usize>, Vec<u8>));
type Weight<'a> = (Dtype, &'a [usize], Vec<u8>);

/// `a.weight` in a file with `companions` is presented as its values times `scales`, read whole or in ranges, and
/// nothing else is listed.
fn check(what: &str, dtype: Dtype, companions: &[Companion], scales: &[f32]) {
    let stored: Vec<u8> = (0..=255).chain(bytes(9, ROWS * COLUMNS * 9 - 256)).collect();
    for stored in stored.chunks(ROWS * COLUMNS) {
        let mut source = Raw::default().with("a.weight", (dtype, &[ROWS, COLUMNS], stored.to_vec()));
        for (name, (dtype, shape, bytes)) in companions {
            source = source.with(name, (*dtype, shape, bytes.clone()));
        }
        let dequantized = Dequantized::new(&source, &manifests()).unwrap();
        let info = TensorInfo { name: "a.weight".to_owned(), dtype: Dtype::BF16, shape: vec![ROWS, COLUMNS] };
        assert_eq!((dequantized.info("a.weight"), dequantized.tensors()), (Some(info.clone()), vec![info]), "{what}");
        let want = products(dtype, stored, scales);
        let read = dequantized.read("a.weight").unwrap();
        assert_eq!((read.dtype, &read.shape[..]), (Dtype::BF16, &[ROWS, COLUMNS][..]), "{what}");
        assert_same(what, &read.bytes, &want);
        assert_eq!(dequantized.tensor("a.weight").unwrap().dtype(), DType::BF16);
        for (start, end) in
            (0..=want.len()).step_by(3).flat_map(|start| (start..=want.len()).map(move |end| (start, end)))
        {
            assert_eq!(
                dequantized.read_range("a.weight", start..end).unwrap(),
                read.bytes[start..end],
                "{start}..{end}"
            );
        }
        let too_long = dequantized.read_range("a.weight", 0..want.len() + 2);
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = dequantized.read_range("a.weight", 3..2);
        for refused in [too_long, reversed] {
            assert!(matches!(refused, Err(WeightsError::BadTensor { .. })), "{what}: {refused:?}");
        }
        for (name, _) in companions {
            assert!(dequantized.info(name).is_none(), "{what}: {name} is listed");
            assert!(matches!(dequantized.read(name), Err(WeightsError::Missing { .. })), "{what}: {name} is readable");
        }
    }
}

fn json(text: &str) -> (Dtype, Vec<usize>, Vec<u8>) {
    (Dtype::U8, vec![text.len()], text.as_bytes().to_vec())
}

#[test]
fn every_form_of_scale_is_applied() {
    for (at, dtype) in [Dtype::F8_E4M3, Dtype::F8_E5M2].into_iter().enumerate() {
        let seed = at as u32;
        let one = &scales(seed, 1)[..];
        let rows = &scales(seed + 7, ROWS)[..];
        let empty = |shape: &[usize]| f32s(shape, &[]);
        let marker = |shape: &[usize]| (dtype, shape.to_vec(), vec![1; shape.iter().product()]);
        let input = || f32s(&[], &[0.3]);
        let described = ["float8_e4m3fn", "float8_e5m2"][at];
        let described = || json(&format!("{{\"format\": {described:?}, \"full_precision_matrix_mult\": true}}"));
        check("plain", dtype, &[], &[1.0]);
        check("plain, marked", dtype, &[("scaled_fp8", marker(&[0]))], &[1.0]);
        check("marked", dtype, &[("m.scaled_fp8", marker(&[2])), ("a.scale_weight", f32s(&[], one))], one);
        check("inputs", dtype, &[("a.scale_weight", f32s(&[1], one)), ("a.scale_input", input())], one);
        check("newer", dtype, &[("a.weight_scale", f32s(&[], one)), ("a.input_scale", input())], one);
        check("one by one", dtype, &[("a.weight_scale", f32s(&[1, 1], one))], one);
        check("rows", dtype, &[("a.weight_scale", f32s(&[ROWS], rows))], rows);
        check("columns of rows", dtype, &[("a.weight_scale", f32s(&[ROWS, 1], rows))], rows);
        check("described", dtype, &[("a.comfy_quant", described()), ("a.weight_scale", f32s(&[], one))], one);
        check("empty", dtype, &[("a.weight_scale", empty(&[0])), ("a.input_scale", empty(&[0]))], &[1.0]);
        check("short", dtype, &[("a.weight_scale", (Dtype::BF16, vec![], vec![0xa0, 0x3c]))], &[0.019_531_25]);
    }
}

#[test]
fn files_with_unsupported_scales_are_refused() {
    let (fp8, shape) = (Dtype::F8_E4M3, &[ROWS, COLUMNS]);
    let weight = (fp8, &shape[..], bytes(1, ROWS * COLUMNS));
    let half = (Dtype::BF16, &shape[..], bytes(1, ROWS * COLUMNS * 2));
    let one = f32s(&[], &[0.5]);
    let cases: Vec<(&str, &Weight, Vec<Companion>)> = vec![
        ("one for each of 6 rows", &weight, vec![("a.weight_scale", f32s(&[2], &[0.5, 0.5]))]),
        ("one for each of 6 rows", &weight, vec![("a.weight_scale", f32s(&[ROWS, 5], &[0.5; 30]))]),
        ("found U8", &weight, vec![("a.weight_scale", (Dtype::U8, vec![ROWS], vec![1; ROWS]))]),
        ("not finite", &weight, vec![("a.scale_weight", f32s(&[], &[f32::NAN]))]),
        ("has another scale", &weight, vec![("a.scale_weight", one.clone()), ("a.weight_scale", one.clone())]),
        ("found in BF16", &half, vec![("a.scale_weight", one.clone())]),
        ("\"int8_tensorwise\"", &weight, vec![("a.comfy_quant", json(r#"{"format": "int8_tensorwise"}"#))]),
        ("\"nvfp4\"", &half, vec![("a.comfy_quant", json(r#"{"format": "nvfp4"}"#))]),
        ("\"mxfp8\"", &weight, vec![("a.comfy_quant", json(r#"{"format": "mxfp8"}"#))]),
        ("\"convrot\"", &weight, vec![("a.comfy_quant", json(r#"{"format": "float8_e4m3fn", "convrot": true}"#))]),
        ("found Some(F8_E4M3)", &weight, vec![("a.comfy_quant", json(r#"{"format": "float8_e5m2"}"#))]),
        ("a.weight_scale is missing", &weight, vec![("a.comfy_quant", json(r#"{"format": "float8_e4m3fn"}"#))]),
        ("a JSON object", &weight, vec![("a.comfy_quant", json("[]"))]),
        ("at most 4096 bytes", &weight, vec![("a.comfy_quant", (Dtype::U8, vec![5000], vec![b' '; 5000]))]),
    ];
    for (expected, (dtype, shape, bytes), companions) in cases {
        let mut source = Raw::default().with("a.weight", (*dtype, shape, bytes.clone()));
        for (name, (dtype, shape, bytes)) in &companions {
            source = source.with(name, (*dtype, shape, bytes.clone()));
        }
        let message = Dequantized::new(&source, &manifests()).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("\"a."), "{expected}: {message}");
    }
}

/// The inspection of a file of the tiny FLUX, or why it is refused.
fn inspect(source: &Raw) -> std::result::Result<Inspection, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    save(&path, source, &BTreeMap::new()).unwrap();
    std::fs::write(folder.path().join("config.json"), TINY.config().to_string()).unwrap();
    let hints = Hints { config: Some(TINY.config()), ..Hints::default() };
    let dequantized = Dequantized::open(&path, &manifests()).map_err(|error| error.to_string())?;
    let identified = detect(&dequantized, &manifests(), &hints).map_err(|error| error.to_string())?;
    Ok(Inspection::new(&identified, &identified.canonical(&dequantized)))
}

/// The tiny FLUX under comfy's names with fp8 matrices, each with `companions` in its module.
fn flux(companions: &[(&str, Vec<usize>)]) -> Raw {
    let mut source = Raw::default();
    for (name, info) in TINY.foreign("comfy").tensors {
        let count = info.shape.iter().product();
        let Some(module) = name.strip_suffix("weight").filter(|_| info.shape.len() == 2) else {
            source = source.with(&name, (Dtype::BF16, &info.shape, bytes(3, count * 2)));
            continue;
        };
        source = source.with(&name, (Dtype::F8_E4M3, &info.shape, bytes(5, count)));
        for (ending, shape) in companions {
            let values = vec![0.5; shape.iter().product()];
            let (dtype, shape, bytes) = f32s(shape, &values);
            source = source.with(&format!("{module}{ending}"), (dtype, &shape, bytes));
        }
    }
    source
}

#[test]
fn every_scale_of_a_flux_has_an_outcome() {
    let plain = inspect(&flux(&[])).unwrap();
    let mut source = flux(&[("scale_weight", vec![]), ("scale_input", vec![1])]);
    source = source.with("model.diffusion_model.scaled_fp8", (Dtype::F8_E4M3, &[2], vec![0, 0]));
    // The quantisation of a text encoder in the same file does not matter.
    source = source.with("text_encoders.t5.a.comfy_quant", (Dtype::U8, &[2], b"{}".to_vec()));
    source = source.with("text_encoders.t5.a.weight_scale_2", (Dtype::F32, &[], vec![0; 4]));
    let found = inspect(&source).unwrap();
    assert!(plain.is_complete() && found.is_complete(), "{found}");
    let matrices = found.used - plain.used;
    assert_eq!(matrices, TINY.foreign("comfy").tensors.values().filter(|info| info.shape.len() == 2).count());
    let skipped = |reason: &str| found.skipped.iter().filter(|tensor| tensor.reason.contains(reason)).count();
    assert_eq!((skipped("activations"), skipped("marker"), skipped("text encoder")), (matrices, 1, 2));
    assert_eq!(found.skipped.len(), matrices + 3);
    assert_eq!((&plain.skipped[..], plain.dtypes.get("BF16")), (&[][..], Some(&plain.dtypes.values().sum())));
    let note = format!("{matrices} tensors are in fp8, {matrices} of them with scales");
    assert!(found.notes.contains(&note), "{:?}", found.notes);
}

#[test]
fn files_with_scales_that_are_not_applied_are_refused() {
    for (expected, name, dtype) in [
        ("scaled weights", "model.diffusion_model.img_in.lin.scale_weight", Dtype::F32),
        ("scaled weights", "model.diffusion_model.scaled_fp8", Dtype::I8),
        ("scaled by blocks", "model.diffusion_model.img_in.weight_scale_inv", Dtype::F32),
        ("with two scales", "model.diffusion_model.img_in.weight_scale_2", Dtype::F32),
    ] {
        let source = flux(&[]).with(name, (dtype, &[1], vec![0; dtype.bitsize() / 8]));
        let message = inspect(&source).unwrap_err();
        assert!(message.contains(expected) && message.contains("use the bf16"), "{name}: {message}");
    }
}
