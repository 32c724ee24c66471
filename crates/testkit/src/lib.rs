//! Test helpers: [`assert_close`], fixtures, seeded weights ([`seeded`]), model folders ([`assemble_pipeline`]) and the
//! libraries of plugins ([`plugin_folder`]).
//!
//! Relative error means ||got - want|| / ||want|| over the whole tensor, summed in f64 whatever their dtype.

mod pipelines;
mod plugins;

pub use pipelines::assemble_pipeline;
pub use plugins::plugin_folder;

use candle_core::{DType, Device, Result, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Reads all tensors of a safetensors file.
///
/// # Panics
/// If the file cannot be read: a fixture is part of the repository.
pub fn fixture(path: impl AsRef<Path>) -> BTreeMap<String, Tensor> {
    let path = path.as_ref();
    let tensors = candle_core::safetensors::load(path, &Device::Cpu);
    let tensors = tensors.unwrap_or_else(|error| panic!("fixture {}: {error}", path.display()));
    tensors.into_iter().collect()
}

/// A weight in f32 that depends only on `name`, `shape` and `salt`, as in tests/fixtures/seeded.py: value i is the i-th
/// output of splitmix64 seeded with FNV-1a of salt and name, as 24 bits in -1..1, scaled by the fan-in of the layer.
/// Norm weights are about 1, biases about 0.
///
/// # Panics
/// A tensor operation fails.
pub fn seeded(name: &str, shape: &[usize], salt: &str) -> Tensor {
    let key = fnv(&format!("{salt}{name}"));
    let fan_in: usize = shape.iter().skip(1).product();
    let scale = (3.0 / fan_in as f64).sqrt() as f32;
    let value = |index: usize| match shape.len() {
        0 | 1 if name.ends_with(".weight") => 1.0 + 0.3 * uniform(key, index),
        0 | 1 => 0.2 * uniform(key, index),
        _ => uniform(key, index) * scale,
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The [`seeded`] tensors of a shapes.json, `{name: shape}`.
///
/// # Panics
/// The file cannot be read or parsed.
pub fn seeded_file(shapes: impl AsRef<Path>, salt: &str) -> BTreeMap<String, Tensor> {
    let path = shapes.as_ref();
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("fixture {}: {error}", path.display()));
    let shapes: BTreeMap<String, Vec<usize>> =
        serde_json::from_slice(&text).unwrap_or_else(|error| panic!("fixture {}: {error}", path.display()));
    let tensor = |(name, shape): (String, Vec<usize>)| (name.clone(), seeded(&name, &shape, salt));
    shapes.into_iter().map(tensor).collect()
}

/// FNV-1a.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |key, byte| (key ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Output `index` of splitmix64 seeded with `key`, as 24 bits in -1..1.
fn uniform(key: u64, index: usize) -> f32 {
    let mut z = key.wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    ((z >> 40) as f32 - (1 << 23) as f32) / (1 << 23) as f32
}

/// Panics unless `got` has the shape of `want` and a relative error of at most `bound`.
///
/// # Panics
/// If it has not. The message starts with `what`.
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, bound: f64) {
    match relative_error(got, want) {
        Ok(error) if error <= bound => {}
        Ok(error) => panic!("{what}: relative error {error:.3e}, allowed {bound:.1e}"),
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Relative error of `got`, or the norm of `got` if `want` is zero. A NaN in either tensor gives infinity.
///
/// # Shapes
/// Any shape, the same for both.
///
/// # Errors
/// Different shapes, or a dtype that cannot be converted to f64.
pub fn relative_error(got: &Tensor, want: &Tensor) -> Result<f64> {
    if got.dims() != want.dims() {
        candle_core::bail!("shape {:?}, expected {:?}", got.dims(), want.dims());
    }
    let got = values(got)?;
    let want = values(want)?;
    let difference = norm(got.iter().zip(&want).map(|(got, want)| got - want));
    let scale = norm(want.iter().copied());
    let error = if scale > 0.0 { difference / scale } else { difference };
    Ok(if error.is_nan() { f64::INFINITY } else { error })
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    /// Values of tests/fixtures/seeded.py.
    #[test]
    fn seeded_values_match_the_script() {
        let values = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(seeded("a.weight", &[3], "")), [1.102_319_1, 0.837_501_65, 1.242_000_3]);
        assert_eq!(values(seeded("b.bias", &[2], "")), [0.090_577_58, 0.183_861_05]);
        let matrix = values(seeded("c.weight", &[2, 3], "s/"));
        assert_eq!(matrix[..3], [-0.031_685_352, -0.367_734_2, 0.579_422_95]);
        assert_eq!(matrix.len(), 6);
    }

    #[test]
    fn measures_relative_error() {
        for (got, want, error) in [
            (&[3.0f32, 4.0][..], &[3.0f32, 4.0][..], 0.0),
            (&[3.0, 5.0], &[3.0, 4.0], 0.2),
            (&[0.0, 2.0], &[0.0, 0.0], 2.0),
            (&[f32::NAN, 0.0], &[1.0, 0.0], f64::INFINITY),
            (&[1.0, 0.0], &[f32::NAN, 0.0], f64::INFINITY),
        ] {
            assert_eq!(relative_error(&tensor(got), &tensor(want)).unwrap(), error, "{got:?} {want:?}");
        }
        let error = relative_error(&tensor(&[1.0]), &tensor(&[1.0, 2.0])).unwrap_err().to_string();
        assert!(error.contains("shape [1], expected [2]"), "{error}");
    }

    #[test]
    #[should_panic(expected = "block 3: relative error 2.000e-1, allowed 1.0e-1")]
    fn tensors_that_are_not_close_panic() {
        assert_close("block 3", &tensor(&[3.0, 5.0]), &tensor(&[3.0, 4.0]), 0.1);
    }
}
