//! [`rms_norm`] and [`rms_norm_rope`]: root-mean-square norm, rotary position embedding, and their gradients.

use super::sum_over;
use crate::kernel::{self, CpuKernel, column_sums, for_rows};
use crate::reference;
use crate::rope::{RopeOp, RotaryAngles};
use crate::simd::{Element, Isa, Real, SimdKernel, dispatch};
use candle_core::{D, Result, Shape, Tensor, bail};
use std::ops::Range;

/// Root-mean-square norm over the last dimension, then rotary position embedding on interleaved pairs (RoFormer, eq.
/// 34). The cosines and sines are constants and get no gradient.
///
/// # Shapes
/// x (batch, tokens, heads, head_dim), weight (head_dim), cos and sin (tokens, head_dim / 2) -> as x.
///
/// # Errors
/// Shapes that contradict each other, or an odd head_dim.
pub fn rms_norm_rope(x: &Tensor, weight: &Tensor, cos: &Tensor, sin: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(out) = crate::cuda::rms_norm_rope(x, weight, Some((cos, sin)), eps)? {
        return Ok(out);
    }
    if !kernel::supported(x) {
        return reference::rms_norm_rope(x, weight, cos, sin, eps);
    }
    let rotation = RotaryAngles::of(x, cos, sin)?;
    if weight.dims() != [rotation.head_dim] {
        bail!("rms_norm_rope: x {:?}, weight {:?}", x.dims(), weight.dims());
    }
    kernel::apply(RmsNormRopeOp { eps, rotation }, &[x, &weight.to_dtype(x.dtype())?])
}

/// Root-mean-square norm over the last dimension: x / √(mean x² + eps) · weight (`torch.nn.RMSNorm`).
///
/// # Shapes
/// x (.., channels), weight (channels) -> as x.
///
/// # Errors
/// Shapes that contradict each other.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(out) = crate::cuda::rms_norm_rope(x, weight, None, eps)? {
        return Ok(out);
    }
    if !kernel::supported(x) {
        return reference::rms_norm(x, weight, eps);
    }
    let width = x.dim(D::Minus1)?;
    if weight.dims() != [width] {
        bail!("rms_norm: x {:?}, weight {:?}", x.dims(), weight.dims());
    }
    kernel::apply(RmsNormOp { eps, width }, &[x, &weight.to_dtype(x.dtype())?])
}

#[derive(Clone, Copy)]
struct RmsNormOp {
    eps: f64,
    width: usize,
}

impl RmsNormOp {
    fn gradients(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let x = args[0];
        let weight = args[1];
        Ok(vec![
            kernel::gradient(x, RmsNormInputGradient(*self), &[x, weight, grad])?,
            kernel::gradient(weight, RmsNormWeightGradient(*self), &[x, grad])?,
        ])
    }
}

impl CpuKernel for RmsNormOp {
    const NAME: &'static str = "rms_norm";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = vec![E::zero(); inputs[0].len()];
        for_rows(&mut out, self.width, |first, out| {
            dispatch(RmsNormForward { eps: self.eps, out, x: &inputs[0][first * self.width..], weight: inputs[1] })
        });
        Ok(out)
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        self.gradients(args, grad)
    }
}

struct RmsNormInputGradient(RmsNormOp);

impl CpuKernel for RmsNormInputGradient {
    const NAME: &'static str = "rms_norm gradient of x";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let RmsNormOp { eps, width } = self.0;
        let mut out = vec![E::zero(); inputs[0].len()];
        for_rows(&mut out, width, |first, out| {
            let rows = first * width..;
            dispatch(RmsNormBackward {
                eps,
                out,
                x: &inputs[0][rows.clone()],
                weight: inputs[1],
                grad: &inputs[2][rows],
            })
        });
        Ok(out)
    }
}

struct RmsNormWeightGradient(RmsNormOp);

impl CpuKernel for RmsNormWeightGradient {
    const NAME: &'static str = "rms_norm gradient of the weight";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let RmsNormOp { eps, width } = self.0;
        let add = |rows: Range<usize>, sums: &mut [E::Work]| {
            let range = rows.start * width..rows.end * width;
            dispatch(SumScaledRows { eps, sums, x: &inputs[0][range.clone()], grad: &inputs[1][range] })
        };
        Ok(column_sums::<E>(1, inputs[0].len() / width, width, add))
    }

    fn shape(&self, _: &Shape) -> Shape {
        self.0.width.into()
    }
}

struct RmsNormRopeOp {
    eps: f64,
    rotation: RotaryAngles,
}

impl CpuKernel for RmsNormRopeOp {
    const NAME: &'static str = "rms_norm_rope";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = vec![E::zero(); inputs[0].len()];
        let tables = &self.rotation.tables::<E>()?;
        for_rows(&mut out, self.rotation.head_dim, |first, out| {
            dispatch(RmsNormRopeForward { op: self, first, out, x: inputs[0], weight: inputs[1], tables })
        });
        Ok(out)
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let unrotated = kernel::apply(RopeOp(self.rotation.inverse()?), &[&grad.detach()])?;
        RmsNormOp { eps: self.eps, width: self.rotation.head_dim }.gradients(args, &unrotated)
    }
}

/// 1 / √(mean x² + eps) of a row.
#[inline(always)]
fn factor<E: Element>(row: &[E], eps: f64) -> E::Work {
    let mean = sum_over([row; 3], |x, _, _| x.load() * x.load()) / E::Work::cast(row.len() as f64);
    E::Work::ONE / (mean + E::Work::cast(eps)).root()
}

struct RmsNormForward<'a, E> {
    eps: f64,
    out: &'a mut [E],
    x: &'a [E],
    weight: &'a [E],
}

impl<E: Element> SimdKernel for RmsNormForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.weight.len();
        for (out, x) in self.out.chunks_exact_mut(width).zip(self.x.chunks_exact(width)) {
            let factor = factor(x, self.eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = E::store(x.load() * factor * weight.load());
            }
        }
    }
}

struct RmsNormRopeForward<'a, E: Element> {
    op: &'a RmsNormRopeOp,
    first: usize,
    out: &'a mut [E],
    x: &'a [E],
    weight: &'a [E],
    tables: &'a [Vec<E::Work>; 2],
}

impl<E: Element> SimdKernel for RmsNormRopeForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.op.rotation.head_dim;
        let rows = self.x[self.first * width..].chunks_exact(width);
        for (row, (out, x)) in self.out.chunks_exact_mut(width).zip(rows).enumerate() {
            let (cos, sin) = self.op.rotation.row(self.tables, self.first + row);
            let factor = factor(x, self.op.eps);
            let pairs = out.chunks_exact_mut(2).zip(x.chunks_exact(2)).zip(self.weight.chunks_exact(2));
            for (((out, x), weight), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
                let even = x[0].load() * factor * weight[0].load();
                let odd = x[1].load() * factor * weight[1].load();
                out[0] = E::store(even * *cos - odd * *sin);
                out[1] = E::store(even * *sin + odd * *cos);
            }
        }
    }
}

/// With h = grad · weight: factor · (h - x · factor² · mean(h x)).
struct RmsNormBackward<'a, E> {
    eps: f64,
    out: &'a mut [E],
    x: &'a [E],
    weight: &'a [E],
    grad: &'a [E],
}

impl<E: Element> SimdKernel for RmsNormBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.weight.len();
        let inputs = self.x.chunks_exact(width).zip(self.grad.chunks_exact(width));
        for (out, (x, grad)) in self.out.chunks_exact_mut(width).zip(inputs) {
            let factor = factor(x, self.eps);
            let product = sum_over([x, grad, self.weight], |x, grad, weight| grad.load() * weight.load() * x.load());
            let projection = factor * factor * product / E::Work::cast(width as f64);
            for (((out, x), grad), weight) in out.iter_mut().zip(x).zip(grad).zip(self.weight) {
                let scaled = grad.load() * weight.load();
                *out = E::store(factor * (-x.load()).times_plus::<L>(projection, scaled));
            }
        }
    }
}

/// sums += grad · x · factor, row by row.
struct SumScaledRows<'a, E: Element> {
    eps: f64,
    sums: &'a mut [E::Work],
    x: &'a [E],
    grad: &'a [E],
}

impl<E: Element> SimdKernel for SumScaledRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.sums.len();
        for (x, grad) in self.x.chunks_exact(width).zip(self.grad.chunks_exact(width)) {
            let factor = factor(x, self.eps);
            for ((sum, x), grad) in self.sums.iter_mut().zip(x).zip(grad) {
                *sum = grad.load().times_plus::<L>(x.load() * factor, *sum);
            }
        }
    }
}
