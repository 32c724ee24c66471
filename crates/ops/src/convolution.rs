//! [`convolution`], [`activated_convolution`] and [`upsampled_convolution`]: convolutions as products over parts of the
//! image, in parallel.

use crate::kernel::contiguous;
use crate::simd::CpuFeatures;
use crate::strided_product::{StridedMatrix, strided_product};
use crate::winograd::{ChannelAffine, WinogradOp};
use crate::{reference, silu};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;

/// Pixels of a band, about: enough columns for a product at the full rate, and few enough that what is unfolded for it
/// stays in a cache.
const BAND: usize = 512;

/// Output channels from which on products of bf16 are worth it: the rows of a tile of AMX. The last convolution of an
/// autoencoder has three, and rounding there would be seen most.
const FEWEST_BF16_OUTPUTS: usize = 16;

/// A square convolution with stride 1 (`torch.nn.functional.conv2d`), padded with zeros by half the kernel, so that the
/// output has the size of the image. Nothing that is trained comes before one, so it has no backward: tracked arguments
/// are left to candle, as are GPUs. A weight in bf16 beside an image in f32 lets 3 x 3 kernels of many outputs round what
/// they multiply to bf16, where the processor is faster at that; what is stored stays f32.
///
/// # Shapes
/// x (batch, inputs, height, width), weight (outputs, inputs, k, k) with odd k, bias (outputs) -> (batch, outputs, height,
/// width).
///
/// # Errors
/// Shapes that contradict each other.
pub fn convolution(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let kernel = check(x, weight)?;
    if kernel == 3 && is_own(x, weight) {
        return winograd(WinogradOp::default(), x, weight, bias, None);
    }
    let out = if is_own(x, weight) {
        // Values of 16 bits are widened, since candle has no convolution of them on a CPU.
        let [image, weight] = [x, weight].map(|tensor| tensor.to_dtype(DType::F32)?.contiguous());
        image?.apply_op2_no_bwd(&weight?, &ConvolutionOp)?.to_dtype(x.dtype())?
    } else {
        x.conv2d(&weight.to_dtype(x.dtype())?, kernel / 2, 1, 1, 1)?
    };
    match bias {
        None => Ok(out),
        Some(bias) => out.broadcast_add(&bias.to_dtype(x.dtype())?.reshape((1, (), 1, 1))?),
    }
}

/// [`convolution`] of silu(x · scale + shift) with a 3 x 3 kernel, plus `residual`: half of a residual block, whose group
/// norm is the scale and shift. The activation is computed where it is read and never stored.
///
/// # Shapes
/// x and weight as for [`convolution`], `activation` for each sample and input channel, residual of the output's shape ->
/// as [`convolution`].
///
/// # Errors
/// Shapes that contradict each other.
pub fn activated_convolution(
    x: &Tensor,
    activation: &ChannelAffine,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let kernel = check(x, weight)?;
    let channels = x.dim(0)? * x.dim(1)?;
    if activation.scales.len() != channels || activation.shifts.len() != channels {
        bail!("activated convolution: x {:?}, {} scales", x.dims(), activation.scales.len());
    }
    if kernel == 3 && is_own(x, weight) {
        let op = WinogradOp { activation: Some(activation.clone()), ..WinogradOp::default() };
        return winograd(op, x, weight, bias, residual);
    }
    let out = convolution(&silu(&reference::channel_affine(x, activation)?)?, weight, bias)?;
    residual.map_or(Ok(out.clone()), |residual| residual + &out)
}

/// [`convolution`] with a 3 x 3 kernel of the image enlarged twofold by repeating pixels (`torch.nn.Upsample` with
/// scale_factor 2, mode nearest), which is never stored.
///
/// # Shapes
/// x (batch, inputs, height, width), weight and bias as for [`convolution`] -> (batch, outputs, 2 height, 2 width).
///
/// # Errors
/// Shapes that contradict each other.
pub fn upsampled_convolution(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if check(x, weight)? == 3 && is_own(x, weight) {
        return winograd(WinogradOp { upsample: true, ..WinogradOp::default() }, x, weight, bias, None);
    }
    let (_, _, height, width) = x.dims4()?;
    convolution(&x.upsample_nearest2d(2 * height, 2 * width)?, weight, bias)
}

/// Whether this processor multiplies bf16 faster than f32, without which a weight in bf16 makes no difference to
/// [`convolution`].
pub fn has_bf16_products() -> bool {
    CpuFeatures::detect().has_bf16_dot()
}

/// The edge of the kernel.
fn check(x: &Tensor, weight: &Tensor) -> Result<usize> {
    let (_, inputs, kernel, columns) = weight.dims4()?;
    if inputs == 0 || x.dim(1)? != inputs || kernel != columns || kernel % 2 == 0 {
        bail!("convolution: x {:?} does not match weight {:?}", x.dims(), weight.dims());
    }
    Ok(kernel)
}

/// Whether the operations here compute it. The others are candle's.
fn is_own(x: &Tensor, weight: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() != DType::F64 && !x.track_op() && !weight.track_op()
}

fn winograd(
    op: WinogradOp,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let widened = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.contiguous();
    let bias = bias.map(|bias| bias.to_dtype(DType::F32)?.to_vec1()).transpose()?;
    if bias.as_ref().is_some_and(|bias| bias.len() != weight.dims()[0]) {
        bail!("convolution: weight {:?} and a bias of another size", weight.dims());
    }
    let bf16 = x.dtype() == DType::F32 && weight.dtype() == DType::BF16 && weight.dims()[0] >= FEWEST_BF16_OUTPUTS;
    let op = WinogradOp { bias, bf16, ..op };
    let [image, weight] = [widened(x)?, widened(weight)?];
    let out = match residual {
        None => image.apply_op2_no_bwd(&weight, &op)?,
        Some(residual) => image.apply_op3_no_bwd(&weight, &widened(residual)?, &op)?,
    };
    out.to_dtype(x.dtype())
}

struct ConvolutionOp;

impl CustomOp2 for ConvolutionOp {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, inputs, height, width) = lx.shape().dims4()?;
        let (outputs, _, kernel, _) = lw.shape().dims4()?;
        let image = UnfoldedImage { inputs, height, width, kernel };
        let x = contiguous::<f32>(x, lx)?;
        let weight = StridedMatrix::new(contiguous::<f32>(w, lw)?, outputs, inputs * kernel * kernel);
        let rows = BAND.div_ceil(width.max(1));
        let bands: Vec<(usize, Range<usize>)> = (0..batch)
            .flat_map(|sample| (0..height).step_by(rows).map(move |row| (sample, row..height.min(row + rows))))
            .collect();
        let product = |(sample, rows): &(usize, Range<usize>)| {
            let unfolded = image.unfold(&x[sample * image.elements()..][..image.elements()], rows.clone());
            let columns = rows.len() * width;
            strided_product(weight, StridedMatrix::new(&unfolded, weight.columns, columns))
        };
        let products: Vec<Vec<f32>> = bands.par_iter().map(product).collect();
        let mut out = vec![0.0; batch * outputs * height * width];
        for ((sample, rows), product) in bands.into_iter().zip(products) {
            let columns = rows.len() * width;
            for (output, values) in product.chunks_exact(columns.max(1)).enumerate() {
                let start = ((sample * outputs + output) * height + rows.start) * width;
                out[start..start + columns].copy_from_slice(values);
            }
        }
        Ok((CpuStorage::F32(out), (batch, outputs, height, width).into()))
    }
}

/// The sizes of an image and of the kernel that passes over it.
#[derive(Clone, Copy)]
struct UnfoldedImage {
    inputs: usize,
    height: usize,
    width: usize,
    kernel: usize,
}

impl UnfoldedImage {
    fn elements(self) -> usize {
        self.inputs * self.height * self.width
    }

    /// What each weight is multiplied with in some rows of the output.
    ///
    /// # Shapes
    /// x (inputs, height, width) -> (inputs · kernel · kernel, rows · width).
    fn unfold(self, x: &[f32], rows: Range<usize>) -> Vec<f32> {
        let Self { inputs, height, width, kernel } = self;
        let reach = kernel / 2;
        let mut unfolded = vec![0.0; inputs * kernel * kernel * rows.len() * width];
        let mut rest = unfolded.as_mut_slice();
        for (channel, dy, dx) in offsets(inputs, kernel) {
            let (out, others) = std::mem::take(&mut rest).split_at_mut(rows.len() * width);
            rest = others;
            // Output column c reads column c + dx - reach, where that lies within the image.
            let first = reach.saturating_sub(dx);
            let last = (width + reach).saturating_sub(dx).min(width);
            for (out, row) in out.chunks_exact_mut(width.max(1)).zip(rows.clone()) {
                let Some(y) = (row + dy).checked_sub(reach).filter(|y| *y < height) else { continue };
                if first < last {
                    let start = (channel * height + y) * width + first + dx - reach;
                    out[first..last].copy_from_slice(&x[start..start + last - first]);
                }
            }
        }
        unfolded
    }
}

/// Channel, row and column of each weight of an output.
fn offsets(inputs: usize, kernel: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..inputs).flat_map(move |channel| (0..kernel).flat_map(move |dy| (0..kernel).map(move |dx| (channel, dy, dx))))
}
