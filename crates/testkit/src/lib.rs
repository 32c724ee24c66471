//! For tests alone: the tolerance rule, the fixture reader, and weights that need no file.
//!
//! The main items are [`assert_close`] and [`seeded`]. Relative error means ||got - want|| / ||want|| over the whole tensor, summed in
//! f64 whatever the tensors' own format.

mod pipelines;

pub use pipelines::assemble_pipeline;

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

/// The tensor `name` with the values that tests/fixtures/seeded.py gives it, f32: value i is splitmix64 at place i of the
/// stream that FNV-1a of the salted name opens, as 24 bits in -1..1, scaled by what the tensor is.
///
/// # Panics
/// The tensor library refused.
pub fn seeded(name: &str, shape: &[usize], salt: &str) -> Tensor {
    let key = fnv(&format!("{salt}{name}"));
    let inputs: usize = shape.iter().skip(1).product();
    let scale = (3.0 / inputs as f64).sqrt() as f32;
    let value = |place: usize| match shape.len() {
        0 | 1 if name.ends_with(".weight") => 1.0 + 0.3 * uniform(key, place),
        0 | 1 => 0.2 * uniform(key, place),
        _ => uniform(key, place) * scale,
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Every tensor of a shapes.json, `{name: shape}`, with its [`seeded`] values.
///
/// # Panics
/// The file is not one of the fixtures'.
pub fn seeded_file(shapes: impl AsRef<Path>, salt: &str) -> BTreeMap<String, Tensor> {
    let path = shapes.as_ref();
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("fixture {}: {error}", path.display()));
    let shapes: BTreeMap<String, Vec<usize>> =
        serde_json::from_slice(&text).unwrap_or_else(|error| panic!("fixture {}: {error}", path.display()));
    let tensor = |(name, shape): (String, Vec<usize>)| (name.clone(), seeded(&name, &shape, salt));
    shapes.into_iter().map(tensor).collect()
}

fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |key, byte| (key ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// 24 bits in -1..1.
fn uniform(key: u64, place: usize) -> f32 {
    let mut z = key.wrapping_add((place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    ((z >> 40) as f32 - (1 << 23) as f32) / (1 << 23) as f32
}

/// Panics unless `got` has the shape of `want` and a relative error of at most `bound`.
///
/// # Panics
/// If it has not; `what` names it.
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, bound: f64) {
    match relative_error(got, want) {
        Ok(error) if error <= bound => {}
        Ok(error) => panic!("{what}: relative error {error:.3e}, allowed {bound:.1e}"),
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Relative error of `got`; of an all-zero `want`, the norm of `got`. A NaN on either side gives infinity.
///
/// # Shapes
/// Both the same, any.
///
/// # Errors
/// Other shapes, or a number format that cannot be converted to f64.
pub fn relative_error(got: &Tensor, want: &Tensor) -> Result<f64> {
    if got.dims() != want.dims() {
        candle_core::bail!("shape {:?}, expected {:?}", got.dims(), want.dims());
    }
    let (got, want) = (numbers(got)?, numbers(want)?);
    let difference = norm(got.iter().zip(&want).map(|(got, want)| got - want));
    let scale = norm(want.iter().copied());
    let error = if scale > 0.0 { difference / scale } else { difference };
    Ok(if error.is_nan() { f64::INFINITY } else { error })
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn norm(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.map(|number| number * number).sum::<f64>().sqrt()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tensor(numbers: &[f32]) -> Tensor {
        Tensor::new(numbers, &Device::Cpu).unwrap()
    }

    /// The values that tests/fixtures/seeded.py gives.
    #[test]
    fn seeded_values_are_those_of_the_script() {
        let values = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(seeded("a.weight", &[3], "")), [1.102_319_1, 0.837_501_65, 1.242_000_3]);
        assert_eq!(values(seeded("b.bias", &[2], "")), [0.090_577_58, 0.183_861_05]);
        let matrix = values(seeded("c.weight", &[2, 3], "s/"));
        assert_eq!(matrix[..3], [-0.031_685_352, -0.367_734_2, 0.579_422_95]);
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
        assert!(relative_error(&tensor(&[1.0]), &tensor(&[1.0, 2.0])).is_err());
    }

    #[test]
    #[should_panic(expected = "block 3: relative error 2.000e-1, allowed 1.0e-1")]
    fn refuses_what_is_not_close() {
        assert_close("block 3", &tensor(&[3.0, 5.0]), &tensor(&[3.0, 4.0]), 0.1);
    }
}
