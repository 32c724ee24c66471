//! [`Convolution`]: the tensor library's, a band of rows at a time where a GPU would unfold too much at once.

use candle_core::{Result, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, Module};

/// Numbers that a GPU may unfold at once. Its kernel numbers them in 32 bits, and 4 GB are enough.
const UNFOLDED: usize = 1 << 30;

/// A square convolution without dilation.
#[derive(Debug)]
pub(crate) struct Convolution(Conv2d);

impl Convolution {
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Self {
        Self(Conv2d::new(weight, bias, config))
    }

    /// Rows of the result, as many at a time as unfold to at most `most` numbers; each band sees the rows around it.
    fn in_bands(&self, x: &Tensor, most: usize) -> Result<Tensor> {
        let (config, edge) = (*self.0.config(), self.0.weight().dim(2)?);
        let (batch, channels, height, width) = x.dims4()?;
        let places = |extent: usize| (extent + 2 * config.padding).saturating_sub(edge) / config.stride + 1;
        let band = (most / (batch * channels * edge * edge * places(width)).max(1)).max(1);
        if band >= places(height) {
            return self.0.forward(x);
        }
        let padding = config.padding;
        let padded = x.pad_with_zeros(2, padding, padding)?.pad_with_zeros(3, padding, padding)?;
        let unpadded = Conv2dConfig { padding: 0, ..config };
        let conv = Conv2d::new(self.0.weight().clone(), self.0.bias().cloned(), unpadded);
        let rows = |first: usize| {
            let count = band.min(places(height) - first);
            conv.forward(&padded.narrow(2, first * config.stride, (count - 1) * config.stride + edge)?.contiguous()?)
        };
        Tensor::cat(&(0..places(height)).step_by(band).map(rows).collect::<Result<Vec<_>>>()?, 2)
    }
}

impl Module for Convolution {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.in_bands(x, if x.device().is_cuda() { UNFOLDED } else { usize::MAX })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn bands_make_the_whole() {
        for (edge, padding, stride, height) in [(3, 1, 1, 11), (3, 0, 2, 12), (1, 0, 1, 5), (3, 1, 2, 7)] {
            let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
            let config = Conv2dConfig { padding, stride, ..Conv2dConfig::default() };
            let conv = Convolution::new(random(&[4, 3, edge, edge]), Some(random(&[4])), config);
            let x = random(&[2, 3, height, 6]);
            let whole = conv.forward(&x).unwrap();
            for rows in 1..=3 {
                let most = rows * 2 * 3 * edge * edge * whole.dim(3).unwrap();
                let difference = (conv.in_bands(&x, most).unwrap() - &whole).unwrap().abs().unwrap().max_all().unwrap();
                assert!(
                    difference.to_scalar::<f32>().unwrap() < 1e-5,
                    "{edge} {padding} {stride}, {rows} rows at a time"
                );
            }
        }
    }
}
