//! [`group_norm`]: normalises groups of channels, in parallel over groups; and [`GroupMoments`], what it normalises by.

use crate::kernel::{self, CpuKernel};
use crate::reference;
use crate::simd::{Element, Isa, Real as _, SimdKernel, dispatch};
use crate::winograd::ChannelAffine;
use candle_core::{D, DType, Result, Storage, Tensor, bail};
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
        let moments = Moments::of(values);
        (moments.mean, 1.0 / (moments.variance + self.eps).sqrt())
    }
}

/// Mean and variance of some values.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Moments {
    count: f64,
    mean: f64,
    variance: f64,
}

impl Moments {
    fn of<E: Element>(values: &[E]) -> Self {
        let count = values.len() as f64;
        let [sum, squares] = dispatch(PowerSums { values });
        let mean = sum / count.max(1.0);
        Self { count, mean, variance: (squares / count.max(1.0) - mean * mean).max(0.0) }
    }

    /// Those of both together (Chan, Golub and LeVeque, 1983, equation 2.1).
    fn and(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0.0 {
            return self;
        }
        let share = other.count / count;
        let difference = other.mean - self.mean;
        let within = self.variance * (1.0 - share) + other.variance * share;
        let between = difference * difference * share * (1.0 - share);
        Self { count, mean: self.mean + difference * share, variance: within + between }
    }
}

/// Σ x and Σ x², in eight partial sums that a processor adds side by side.
struct PowerSums<'a, E> {
    values: &'a [E],
}

impl<E: Element> SimdKernel for PowerSums<'_, E> {
    type Output = [f64; 2];

    #[inline(always)]
    fn run<L: Isa>(self) -> [f64; 2] {
        let mut sums = [[0.0; 8]; 2];
        let (chunks, rest) = self.values.as_chunks::<8>();
        for chunk in chunks {
            for (lane, value) in chunk.iter().enumerate() {
                let value = value.to_f64();
                sums[0][lane] += value;
                sums[1][lane] = value.times_plus::<L>(value, sums[1][lane]);
            }
        }
        let rest = rest.iter().map(|value| value.to_f64());
        let rest = rest.fold([0.0; 2], |[sum, squares], value| [sum + value, squares + value * value]);
        [sums[0].iter().sum::<f64>() + rest[0], sums[1].iter().sum::<f64>() + rest[1]]
    }
}

/// Means and variances of the groups of channels of each sample. Those of several parts of an image can be joined.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupMoments {
    groups: usize,
    /// (batch, groups).
    moments: Vec<Moments>,
}

impl GroupMoments {
    /// Those of `x`.
    ///
    /// # Shapes
    /// x (batch, channels, height, width), with `groups` a divisor of channels.
    ///
    /// # Errors
    /// Another number of dimensions, or groups that do not divide the channels.
    pub fn of(x: &Tensor, groups: usize) -> Result<Self> {
        let (batch, channels, height, width) = x.dims4()?;
        if groups == 0 || channels % groups != 0 {
            bail!("group norm: {channels} channels in {groups} groups");
        }
        let size = channels / groups * height * width;
        let x = x.to_dtype(DType::F32)?.contiguous()?;
        if !x.device().is_cpu() {
            return Self::on_device(&x.reshape((batch * groups, size))?, groups);
        }
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("group norm: expected a tensor on the CPU") };
        let values = kernel::contiguous::<f32>(storage, layout)?;
        let moments = if size == 0 {
            vec![Moments::default(); batch * groups]
        } else {
            values.par_chunks(size).map(Moments::of).collect()
        };
        Ok(Self { groups, moments })
    }

    /// # Shapes
    /// x (batch · groups, values).
    fn on_device(x: &Tensor, groups: usize) -> Result<Self> {
        let means = x.mean_keepdim(D::Minus1)?;
        let variances = x.broadcast_sub(&means)?.sqr()?.mean(D::Minus1)?.to_vec1::<f32>()?;
        let count = x.dim(1)? as f64;
        let means = means.flatten_all()?.to_vec1::<f32>()?.into_iter().zip(variances);
        let moments = |(mean, variance)| Moments { count, mean: f64::from(mean), variance: f64::from(variance) };
        Ok(Self { groups, moments: means.map(moments).collect() })
    }

    /// Those of the samples of both together, sample by sample.
    ///
    /// # Errors
    /// Another number of samples or groups.
    pub fn and(&self, other: &Self) -> Result<Self> {
        if self.groups != other.groups || self.moments.len() != other.moments.len() {
            bail!("group norm: {} and {} groups cannot be joined", self.moments.len(), other.moments.len());
        }
        let joined = self.moments.iter().zip(&other.moments).map(|(a, b)| a.and(*b));
        Ok(Self { groups: self.groups, moments: joined.collect() })
    }

    /// Those of all samples together, as of one.
    #[must_use]
    pub fn pooled(&self) -> Self {
        let mut moments = vec![Moments::default(); self.groups];
        for (index, sample) in self.moments.iter().enumerate() {
            let group = &mut moments[index % self.groups];
            *group = group.and(*sample);
        }
        Self { groups: self.groups, moments }
    }

    /// What a group norm with these moments does to each channel.
    ///
    /// # Shapes
    /// weight and bias (channels).
    ///
    /// # Errors
    /// A number of channels that the groups do not divide.
    pub fn affine(&self, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<ChannelAffine> {
        let [weight, bias] = [weight, bias].map(|tensor| tensor.to_dtype(DType::F32)?.to_vec1::<f32>());
        let (weight, bias) = (weight?, bias?);
        if weight.len() != bias.len() || weight.len() % self.groups != 0 {
            bail!("group norm: weight ({}), bias ({}), {} groups", weight.len(), bias.len(), self.groups);
        }
        let size = weight.len() / self.groups;
        let mut affine = ChannelAffine { scales: Vec::new(), shifts: Vec::new() };
        for (index, moments) in self.moments.iter().enumerate() {
            let factor = 1.0 / (moments.variance + eps).sqrt();
            let first = index % self.groups * size;
            for channel in first..first + size {
                let scale = f64::from(weight[channel]) * factor;
                affine.scales.push(scale as f32);
                affine.shifts.push((f64::from(bias[channel]) - moments.mean * scale) as f32);
            }
        }
        Ok(affine)
    }
}
