//! [`group_norm`]: normalises groups of channels, in parallel over groups.

use crate::kernel::{self, CpuKernel};
use crate::reference;
use crate::simd::Element;
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// Group norm over channels and pixels (Wu and He, arXiv 1803.08494; `torch.nn.GroupNorm`). Sums are accumulated in f64.
///
/// # Shapes
/// x (batch, channels, ..), weight and bias (channels) -> as x.
///
/// # Errors
/// Shapes that contradict each other.
pub fn group_norm(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    // Nothing that is trained comes before a group norm, so the kernel has no backward.
    if !kernel::supported(x) || x.track_op() || weight.track_op() || bias.track_op() {
        return reference::group_norm(x, groups, weight, bias, eps);
    }
    let channels = x.dim(1)?;
    if groups == 0 || channels % groups != 0 || weight.dims() != [channels] || bias.dims() != [channels] {
        bail!("group_norm: x {:?}, {groups} groups, weight {:?}, bias {:?}", x.dims(), weight.dims(), bias.dims());
    }
    let pixels = x.dims()[2..].iter().product();
    let op = GroupNormOp { channels, pixels, group: channels / groups, eps };
    kernel::apply(op, &[x, &weight.to_dtype(x.dtype())?, &bias.to_dtype(x.dtype())?])
}

struct GroupNormOp {
    channels: usize,
    pixels: usize,
    /// Channels of a group.
    group: usize,
    eps: f64,
}

impl CpuKernel for GroupNormOp {
    const NAME: &'static str = "group_norm";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let [x, weight, bias] = [inputs[0], inputs[1], inputs[2]];
        let mut out = x.to_vec();
        let size = (self.group * self.pixels).max(1);
        out.par_chunks_mut(size).enumerate().for_each(|(index, out)| {
            let (mean, factor) = self.statistics(out);
            let first = index * self.group % self.channels;
            for (channel, out) in out.chunks_exact_mut(self.pixels.max(1)).enumerate() {
                let scale = weight[first + channel].to_f64() * factor;
                let shift = bias[first + channel].to_f64() - mean * scale;
                out.iter_mut().for_each(|value| *value = E::from_f64(value.to_f64() * scale + shift));
            }
        });
        Ok(out)
    }
}

impl GroupNormOp {
    /// Mean and 1 / √(variance + eps) of a group.
    fn statistics<E: Element>(&self, values: &[E]) -> (f64, f64) {
        let mean = sum_of(values, |value| value) / values.len() as f64;
        let variance = sum_of(values, |value| (value - mean) * (value - mean)) / values.len() as f64;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }
}

/// Sum of `map` of each value, in eight partial sums that a processor adds side by side.
fn sum_of<E: Element>(values: &[E], map: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let chunks = values.chunks_exact(8);
    let rest: f64 = chunks.remainder().iter().map(|value| map(value.to_f64())).sum();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += map(value.to_f64()));
    }
    sums.iter().sum::<f64>() + rest
}
