//! The two forms that must be multiplied out: Hadamard products (LoHa) and Kronecker products (LoKr), after LyCORIS.

use candle_core::{DType, Tensor};
use clearform_plugin_abi::sdk::Result;
use clearform_plugin_abi::tensor::OwnedTensor;

/// (w1_a · w1_b) ∘ (w2_a · w2_b) (FedPara, arXiv 2108.06098, eq. 4).
///
/// # Shapes
/// a (outputs, rank), b (rank, inputs) -> (outputs, inputs).
pub fn hadamard(w1: [&OwnedTensor; 2], w2: [&OwnedTensor; 2]) -> Result<OwnedTensor> {
    let product = || OwnedTensor::of_candle(&Tensor::mul(&multiplied(w1)?, &multiplied(w2)?)?);
    product().map_err(|error| error.to_string())
}

/// w1 ⊗ w2, each whole or of two factors.
///
/// # Shapes
/// (a, b) and (c, d) -> (a · c, b · d).
pub fn kronecker(w1: &[&OwnedTensor], w2: &[&OwnedTensor]) -> Result<OwnedTensor> {
    let product = || {
        let (w1, w2) = (whole(w1)?, whole(w2)?);
        let ((a, b), (c, d)) = (w1.dims2()?, w2.dims2()?);
        let w1 = w1.reshape((a, 1, b, 1))?;
        let product = w1.broadcast_mul(&w2.reshape((1, c, 1, d))?)?; // (a, c, b, d)
        OwnedTensor::of_candle(&product.reshape((a * c, b * d))?)
    };
    product().map_err(|error: candle_core::Error| error.to_string())
}

fn whole(factors: &[&OwnedTensor]) -> candle_core::Result<Tensor> {
    match factors {
        [one] => matrix(one),
        [a, b] => multiplied([a, b]),
        _ => candle_core::bail!("expected one factor or two, found {}", factors.len()),
    }
}

fn multiplied([a, b]: [&OwnedTensor; 2]) -> candle_core::Result<Tensor> {
    matrix(a)?.matmul(&matrix(b)?)
}

/// # Shapes
/// (rows, ..) -> (rows, all others together), in f32.
fn matrix(tensor: &OwnedTensor) -> candle_core::Result<Tensor> {
    let tensor = tensor.view().to_candle()?.to_dtype(DType::F32)?;
    tensor.reshape((tensor.dims().first().copied().unwrap_or(1), ()))
}
