//! [`Convolution`]: candle's `Conv2d`, computed in bands of rows where im2col of the whole image would be too large; and
//! [`GroupNorm`].

use candle_core::{Result, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, Module};
use clearform_ops::reference::channel_affine;
use clearform_ops::{
    ChannelAffine, GroupMoments, activated_convolution, convolution, group_norm, silu, upsampled_convolution,
};

/// Elements of the im2col matrix on a GPU. candle's kernel indexes it with 32 bits, and 2^30 f32 values take 4 GB.
const MAX_UNFOLDED: usize = 1 << 30;

/// A square convolution without dilation.
#[derive(Debug)]
pub(crate) struct Convolution(Conv2d);

impl Convolution {
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Self {
        Self(Conv2d::new(weight, bias, config))
    }

    /// The convolution of silu(x · scale + shift), plus `residual`.
    ///
    /// # Shapes
    /// As the module's; residual as the output.
    pub(crate) fn of_activated(
        &self,
        x: &Tensor,
        activation: &ChannelAffine,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        if self.is_own(x) {
            return activated_convolution(x, activation, self.0.weight(), self.0.bias(), residual);
        }
        let out = self.forward(&silu(&channel_affine(x, activation)?)?)?;
        residual.map_or(Ok(out.clone()), |residual| residual + &out)
    }

    /// The convolution of `x` enlarged twofold by repeating pixels.
    ///
    /// # Shapes
    /// (batch, inputs, height, width) -> (batch, outputs, 2 height, 2 width).
    pub(crate) fn of_upsampled(&self, x: &Tensor) -> Result<Tensor> {
        if self.is_own(x) {
            return upsampled_convolution(x, self.0.weight(), self.0.bias());
        }
        let (_, _, height, width) = x.dims4()?;
        self.forward(&x.upsample_nearest2d(2 * height, 2 * width)?)
    }

    /// Whether the operations of `clearform_ops` compute it.
    fn is_own(&self, x: &Tensor) -> bool {
        let config = self.0.config();
        let keeps_size = config.stride == 1 && config.dilation == 1 && config.groups == 1;
        x.device().is_cpu() && keeps_size && self.0.weight().dims().last() == Some(&(2 * config.padding + 1))
    }

    /// Computes as many output rows at a time as unfold to at most `max_unfolded` elements. Bands overlap by the
    /// kernel's reach, so the result is that of the whole image.
    ///
    /// # Shapes
    /// (batch, inputs, height, width) -> (batch, outputs, rows, columns).
    fn in_bands(&self, x: &Tensor, max_unfolded: usize) -> Result<Tensor> {
        let config = *self.0.config();
        let kernel = self.0.weight().dim(2)?;
        let (batch, channels, height, width) = x.dims4()?;
        let output_size = |input: usize| (input + 2 * config.padding).saturating_sub(kernel) / config.stride + 1;
        let rows = output_size(height);
        let unfolded_row = batch * channels * kernel * kernel * output_size(width);
        let band = (max_unfolded / unfolded_row.max(1)).max(1);
        // Weights may be in bf16 beside an image in f32.
        let in_dtype = |tensor: &Tensor| tensor.to_dtype(x.dtype());
        let (weight, bias) = (in_dtype(self.0.weight())?, self.0.bias().map(in_dtype).transpose()?);
        if band >= rows {
            return Conv2d::new(weight, bias, config).forward(x);
        }
        let padding = config.padding;
        let padded = x.pad_with_zeros(2, padding, padding)?.pad_with_zeros(3, padding, padding)?;
        let unpadded = Conv2dConfig { padding: 0, ..config };
        let conv = Conv2d::new(weight, bias, unpadded);
        let convolve_band = |first: usize| {
            let count = band.min(rows - first);
            let input_rows = (count - 1) * config.stride + kernel;
            conv.forward(&padded.narrow(2, first * config.stride, input_rows)?.contiguous()?)
        };
        Tensor::cat(&(0..rows).step_by(band).map(convolve_band).collect::<Result<Vec<_>>>()?, 2)
    }
}

impl Module for Convolution {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.is_own(x) {
            return convolution(x, self.0.weight(), self.0.bias());
        }
        self.in_bands(x, if x.device().is_cuda() { MAX_UNFOLDED } else { usize::MAX })
    }
}

/// `torch.nn.GroupNorm`.
#[derive(Debug)]
pub(crate) struct GroupNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub groups: usize,
    pub eps: f64,
}

impl GroupNorm {
    /// What it does to each channel of images with these moments.
    pub(crate) fn affine(&self, moments: &GroupMoments) -> Result<ChannelAffine> {
        moments.affine(&self.weight, &self.bias, self.eps)
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        group_norm(x, self.groups, &self.weight, &self.bias, self.eps)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clearform_ops::TorchGenerator;

    #[test]
    fn bands_equal_the_whole_convolution() {
        let mut generator = TorchGenerator::new(0);
        for (edge, padding, stride, height) in [(3, 1, 1, 11), (3, 0, 2, 12), (1, 0, 1, 5), (3, 1, 2, 7)] {
            let mut random = |shape: &[usize]| generator.randn(shape).unwrap();
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
