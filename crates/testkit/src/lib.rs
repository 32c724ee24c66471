//! For tests alone: the tolerance rule and the fixture reader.
//!
//! The main item is [`assert_close`]. Relative error means ||got - want|| / ||want|| over the whole tensor, summed in
//! f64 whatever the tensors' own format.

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
