//! Fixtures as tensors, and how far two tensors are apart.
#![allow(dead_code, clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use clearform_plugin_host::PluginRegistry;
use clearform_weights::InMemoryTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A file or folder of tests/fixtures.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// The plugins that cargo built for these tests, which lie beside them.
pub fn registry() -> PluginRegistry {
    let tests = std::env::current_exe().unwrap();
    PluginRegistry::look(&[tests.parent().unwrap().to_owned()]).unwrap()
}

pub fn bytes(path: &str) -> Vec<u8> {
    std::fs::read(fixture(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

pub fn json(path: &str) -> serde_json::Value {
    serde_json::from_slice(&bytes(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

pub fn tensors(path: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(path), &Device::Cpu).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Weights to compute with in f32, whatever they are stored in.
pub fn weights(path: &str) -> InMemoryTensors {
    let widened = |(name, tensor): (String, Tensor)| (name, tensor.to_dtype(DType::F32).unwrap());
    tensors(path).into_iter().map(widened).collect()
}

/// Fails if `got` is further from `want` than `bound`: ||got - want|| / ||want||, summed in f64.
pub fn assert_close(got: &Tensor, want: &Tensor, bound: f64, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}: shape");
    let flat = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (got, want) = (flat(got), flat(want));
    let difference: f64 = got.iter().zip(&want).map(|(got, want)| (got - want).powi(2)).sum();
    let error = (difference / want.iter().map(|want| want.powi(2)).sum::<f64>()).sqrt();
    // Written so that NaN fails.
    assert!(error <= bound, "{what}: relative error {error:.2e} is above {bound:.0e}");
}
