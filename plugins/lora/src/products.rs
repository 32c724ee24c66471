//! Products that are multiplied out, because the plugin interface has no edit for them: LoHa, LoKr and
//! Tucker-decomposed convolutions, as in LyCORIS.

use candle_core::{DType, Result, Tensor};
use clearform_plugin_abi::tensor::OwnedTensor;

/// w1 ⊗ w2, a LoKr.
///
/// # Shapes
/// (a, b) and (c, d) -> (a · c, b · d).
///
/// # Errors
/// candle cannot compute it.
pub fn kronecker(w1: &Tensor, w2: &Tensor) -> Result<Tensor> {
    let (a, b) = w1.dims2()?;
    let (c, d) = w2.dims2()?;
    let product = w1.reshape((a, 1, b, 1))?.broadcast_mul(&w2.reshape((1, c, 1, d))?)?; // (a, c, b, d)
    product.reshape((a * c, b * d))
}

/// The weight of a convolution from its Tucker decomposition: Σ core\[i, j\] · outputs\[i\] · inputs\[j\].
///
/// # Shapes
/// core (i, j, area), outputs (i, rows), inputs (j, channels) -> (rows, channels · area).
///
/// # Errors
/// The factors do not fit together.
pub fn tucker(core: &Tensor, outputs: &Tensor, inputs: &Tensor) -> Result<Tensor> {
    let (i, j, area) = core.dims3()?;
    let (rows, channels) = (outputs.dim(1)?, inputs.dim(1)?);
    let by_rows = outputs.t()?.matmul(&core.reshape((i, j * area))?)?; // (rows, j · area)
    let by_rows = by_rows.reshape((rows, j, area))?.transpose(1, 2)?.reshape((rows * area, j))?;
    let product = by_rows.matmul(inputs)?.reshape((rows, area, channels))?;
    product.transpose(1, 2)?.reshape((rows, channels * area))
}

/// A tensor of the file in f32.
///
/// # Shapes
/// (rows, ..) -> (rows, product of the other dimensions).
///
/// # Errors
/// candle does not have its dtype.
pub fn matrix(tensor: &OwnedTensor) -> Result<Tensor> {
    let tensor = tensor.view().to_candle()?.to_dtype(DType::F32)?;
    tensor.reshape((tensor.dims().first().copied().unwrap_or(1), ()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensor(values: &[[f32; 2]; 2]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    /// Values worked out by hand.
    #[test]
    fn products_have_the_values_of_their_formulas() {
        let a = tensor(&[[1.0, 2.0], [3.0, 4.0]]);
        let b = tensor(&[[0.0, 1.0], [1.0, 1.0]]);
        let expected = [[0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 2.0, 2.0], [0.0, 3.0, 0.0, 4.0], [3.0, 3.0, 4.0, 4.0]];
        assert_eq!(kronecker(&a, &b).unwrap().to_vec2::<f32>().unwrap(), expected);
        // Of a core with two places, each is aᵀ · core · b: [[1, 3], [2, 4]] · [[1, 0], [0, 0]] · b, and with the core
        // [[0, 0], [0, 1]].
        let core = Tensor::new(&[[[1f32, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]], &Device::Cpu).unwrap();
        let product = tucker(&core, &a, &b).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(product, [[0.0, 3.0, 1.0, 3.0], [0.0, 4.0, 2.0, 4.0]]);
    }
}
