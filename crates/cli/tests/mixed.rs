//! Files whose tensors have different dtypes: every tensor is used with its exact values.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::DType;
use clearform_testkit::fixture;
use common::{Tiny, forward, json, run, text};
use std::collections::BTreeSet;

const DTYPES: [DType; 3] = [DType::BF16, DType::F32, DType::F16];

/// The tiny FLUX with dtypes in turn, and the same values widened to f32.
fn tinies() -> [Tiny; 2] {
    let (mut mixed, mut wide) = (Tiny::new(), Tiny::new());
    for (index, (name, tensor)) in mixed.tensors.iter_mut().enumerate() {
        *tensor = tensor.to_dtype(DTYPES[index % 3]).unwrap();
        wide.tensors.insert(name.clone(), tensor.to_dtype(DType::F32).unwrap());
    }
    [&mixed, &wide].iter().for_each(|tiny| tiny.save());
    [mixed, wide]
}

#[test]
fn a_mixed_model_computes_as_its_f32_copy() {
    let [mixed, wide] = tinies();
    let found = json(0, &["inspect", text(mixed.path())]);
    assert_eq!(found["dtypes"].as_object().unwrap().keys().collect::<Vec<_>>(), ["BF16", "F16", "F32"]);
    let bits = |tiny: &Tiny, plan: &str| -> Vec<f32> {
        forward(tiny.path(), &["--attention", plan]).flatten_all().unwrap().to_vec1().unwrap()
    };
    for plan in ["full", "clear:r=2"] {
        let wanted = bits(&wide, plan);
        assert!(wanted.iter().any(|value| *value != 0.0));
        assert_eq!(bits(&mixed, plan), wanted, "{plan}");
    }
}

#[test]
fn a_mixed_model_keeps_its_dtypes_unless_another_is_asked_for() {
    let [mixed, _] = tinies();
    let folder = tempfile::tempdir().unwrap();
    let convert = |name: &str, further: &[&str]| {
        let model = folder.path().join(name);
        run(0, &[&["convert", text(mixed.path()), "-o", text(&model), "--no-distill"], further].concat());
        fixture(model.join("transformer/diffusion_pytorch_model.safetensors"))
    };
    for (name, tensor) in convert("kept", &[]) {
        let wanted = &mixed.tensors[&name];
        assert_eq!(tensor.dtype(), wanted.dtype(), "{name}");
        let bits = |tensor: &candle_core::Tensor| -> Vec<f32> {
            tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(bits(&tensor), bits(wanted), "{name}");
    }
    let dtypes: BTreeSet<_> =
        convert("bf16", &["--dtype", "bf16"]).values().map(|tensor| format!("{:?}", tensor.dtype())).collect();
    assert_eq!(dtypes, BTreeSet::from(["BF16".to_owned()]));
}
