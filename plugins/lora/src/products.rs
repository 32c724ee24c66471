//! Products that are multiplied out, because the plugin interface has no edit for them: LoHa and LoKr, as in LyCORIS.

use candle_core::{DType, Tensor};
use clearform_plugin_abi::sdk::Result;
use clearform_plugin_abi::tensor::OwnedTensor;

/// (w1_a · w1_b) ∘ (w2_a · w2_b), a LoHa (FedPara, arXiv 2108.06098, eq. 4).
///
/// # Shapes
/// each a (outputs, rank) and b (rank, inputs) -> (outputs, inputs).
///
/// # Errors
/// The factors do not fit together.
pub fn hadamard(w1: &[OwnedTensor], w2: &[OwnedTensor]) -> Result<OwnedTensor> {
    let product = || OwnedTensor::from_candle(&Tensor::mul(&multiplied(w1)?, &multiplied(w2)?)?);
    product().map_err(|error| error.to_string())
}

/// w1 ⊗ w2, a LoKr. Each is one matrix, or the product of two factors.
///
/// # Shapes
/// (a, b) and (c, d) -> (a · c, b · d).
///
/// # Errors
/// The factors do not fit together.
pub fn kronecker(w1: &[OwnedTensor], w2: &[OwnedTensor]) -> Result<OwnedTensor> {
    let product = || {
        let w1 = multiplied(w1)?;
        let w2 = multiplied(w2)?;
        let (a, b) = w1.dims2()?;
        let (c, d) = w2.dims2()?;
        let w1 = w1.reshape((a, 1, b, 1))?;
        let product = w1.broadcast_mul(&w2.reshape((1, c, 1, d))?)?; // (a, c, b, d)
        OwnedTensor::from_candle(&product.reshape((a * c, b * d))?)
    };
    product().map_err(|error: candle_core::Error| error.to_string())
}

/// One matrix as it is, or the product of two.
fn multiplied(factors: &[OwnedTensor]) -> candle_core::Result<Tensor> {
    match factors {
        [whole] => matrix(whole),
        [a, b] => matrix(a)?.matmul(&matrix(b)?),
        _ => candle_core::bail!("expected one factor or two, found {}", factors.len()),
    }
}

/// # Shapes
/// (rows, ..) -> (rows, product of the other dimensions), in f32.
fn matrix(tensor: &OwnedTensor) -> candle_core::Result<Tensor> {
    let tensor = tensor.view().to_candle()?.to_dtype(DType::F32)?;
    tensor.reshape((tensor.dims().first().copied().unwrap_or(1), ()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn owned(values: &[[f32; 2]; 2]) -> OwnedTensor {
        OwnedTensor::from_candle(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap()
    }

    fn rows(tensor: &OwnedTensor) -> Vec<Vec<f32>> {
        tensor.view().to_candle().unwrap().to_vec2().unwrap()
    }

    /// Values worked out by hand.
    #[test]
    fn products_have_the_values_of_their_formulas() {
        let a = || owned(&[[1.0, 2.0], [3.0, 4.0]]);
        let b = || owned(&[[0.0, 1.0], [1.0, 1.0]]);
        // a · b = [[2, 3], [4, 7]] and b · a = [[3, 4], [4, 6]].
        let loha = hadamard(&[a(), b()], &[b(), a()]).unwrap();
        assert_eq!(rows(&loha), [[6.0, 12.0], [16.0, 42.0]]);
        let whole = kronecker(&[a()], &[b()]).unwrap();
        let expected = [[0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 2.0, 2.0], [0.0, 3.0, 0.0, 4.0], [3.0, 3.0, 4.0, 4.0]];
        assert_eq!(rows(&whole), expected);
        let factored = kronecker(&[a()], &[b(), owned(&[[1.0, 0.0], [0.0, 1.0]])]).unwrap();
        assert_eq!(rows(&factored), expected);
    }
}
