//! Reading fixtures, and comparing tensors.
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

/// The plugins that cargo built for these tests, as libraries.
pub fn registry() -> PluginRegistry {
    PluginRegistry::scan(&[clearform_testkit::plugin_folder()]).unwrap()
}

/// The bytes of a fixture.
pub fn bytes(path: &str) -> Vec<u8> {
    std::fs::read(fixture(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A fixture as JSON.
pub fn json(path: &str) -> serde_json::Value {
    serde_json::from_slice(&bytes(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The tensors of a fixture, in their own dtypes.
pub fn tensors(path: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(path), &Device::Cpu).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The tensors of a fixture, converted to f32.
pub fn weights(path: &str) -> InMemoryTensors {
    let to_f32 = |(name, tensor): (String, Tensor)| (name, tensor.to_dtype(DType::F32).unwrap());
    tensors(path).into_iter().map(to_f32).collect()
}

/// Fails if the shapes differ, or the [`relative_error`] is above `bound`.
pub fn assert_close(got: &Tensor, want: &Tensor, bound: f64, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}: shape");
    let error = relative_error(got, want);
    // Written so that NaN fails.
    assert!(error <= bound, "{what}: relative error {error:.2e} is above {bound:.0e}");
}

/// ||got - want|| / ||want||, summed in f64.
pub fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    let got = values_in_f64(got);
    let want = values_in_f64(want);
    let difference: f64 = got.iter().zip(&want).map(|(got, want)| (got - want).powi(2)).sum();
    (difference / want.iter().map(|want| want.powi(2)).sum::<f64>()).sqrt()
}

fn values_in_f64(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}
