//! [`modulated_layer_norm`]: layer norm without weights, then modulation (adaLN), and its gradients.

use super::sum_over;
use crate::kernel::{self, CpuKernel, column_sums, for_rows};
use crate::reference;
use crate::simd::{Element, Isa, Real, SimdKernel, dispatch};
use candle_core::{Result, Shape, Tensor, bail};
use std::ops::Range;

/// Layer norm without weights, then modulation: norm(x) (1 + scale) + shift (adaLN; DiT, section 3.2;
/// `AdaLayerNormZero` in diffusers).
///
/// # Shapes
/// x (batch, tokens, width), shift and scale (batch, width) -> as x.
///
/// # Errors
/// Shapes that contradict each other.
pub fn modulated_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(out) = crate::cuda::modulated_layer_norm(x, shift, scale, eps)? {
        return Ok(out);
    }
    if !kernel::supported(x) {
        return reference::modulated_layer_norm(x, shift, scale, eps);
    }
    let (batch, tokens, width) = x.dims3()?;
    if shift.dims() != [batch, width] || scale.dims() != [batch, width] {
        bail!("modulated_layer_norm: x {:?}, shift {:?}, scale {:?}", x.dims(), shift.dims(), scale.dims());
    }
    let shift = shift.to_dtype(x.dtype())?;
    let scale = scale.to_dtype(x.dtype())?;
    kernel::apply(LayerNormOp { batch, tokens, width, eps }, &[x, &shift, &scale])
}

#[derive(Clone, Copy)]
struct LayerNormOp {
    batch: usize,
    tokens: usize,
    width: usize,
    eps: f64,
}

impl CpuKernel for LayerNormOp {
    const NAME: &'static str = "modulated_layer_norm";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = vec![E::zero(); inputs[0].len()];
        for_rows(&mut out, self.width, |first, out| {
            dispatch(LayerNormForward { norm: *self, first, out, x: inputs[0], shift: inputs[1], scale: inputs[2] })
        });
        Ok(out)
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let x = args[0];
        let shift = args[1];
        let scale = args[2];
        Ok(vec![
            kernel::gradient(x, LayerNormInputGradient(*self), &[x, scale, grad])?,
            kernel::gradient(shift, ShiftGradient(*self), &[grad])?,
            kernel::gradient(scale, ScaleGradient(*self), &[x, grad])?,
        ])
    }
}

struct LayerNormInputGradient(LayerNormOp);

impl CpuKernel for LayerNormInputGradient {
    const NAME: &'static str = "modulated_layer_norm gradient of x";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = vec![E::zero(); inputs[0].len()];
        for_rows(&mut out, self.0.width, |first, out| {
            dispatch(LayerNormBackward { norm: self.0, first, out, x: inputs[0], scale: inputs[1], grad: inputs[2] })
        });
        Ok(out)
    }
}

struct ShiftGradient(LayerNormOp);

impl CpuKernel for ShiftGradient {
    const NAME: &'static str = "modulated_layer_norm gradient of the shift";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let LayerNormOp { batch, tokens, width, .. } = self.0;
        let add = |rows: Range<usize>, sums: &mut [E::Work]| {
            for row in inputs[0][rows.start * width..rows.end * width].chunks_exact(width) {
                sums.iter_mut().zip(row).for_each(|(sum, grad)| *sum += grad.load());
            }
        };
        Ok(column_sums::<E>(batch, tokens, width, add))
    }

    fn shape(&self, _: &Shape) -> Shape {
        (self.0.batch, self.0.width).into()
    }
}

struct ScaleGradient(LayerNormOp);

impl CpuKernel for ScaleGradient {
    const NAME: &'static str = "modulated_layer_norm gradient of the scale";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let LayerNormOp { batch, tokens, width, eps } = self.0;
        let add = |rows: Range<usize>, sums: &mut [E::Work]| {
            let range = rows.start * width..rows.end * width;
            dispatch(SumNormedRows { eps, sums, x: &inputs[0][range.clone()], grad: &inputs[1][range] })
        };
        Ok(column_sums::<E>(batch, tokens, width, add))
    }

    fn shape(&self, _: &Shape) -> Shape {
        (self.0.batch, self.0.width).into()
    }
}

/// Mean and 1 / √(variance + eps) of a row.
#[inline(always)]
fn statistics<E: Element>(row: &[E], eps: f64) -> (E::Work, E::Work) {
    let count = E::Work::cast(row.len() as f64);
    let mean = sum_over([row; 3], |x, _, _| x.load()) / count;
    let square = |x: E, _: E, _: E| {
        let centred = x.load() - mean;
        centred * centred
    };
    let variance = sum_over([row; 3], square) / count;
    (mean, E::Work::ONE / (variance + E::Work::cast(eps)).root())
}

struct LayerNormForward<'a, E> {
    norm: LayerNormOp,
    first: usize,
    out: &'a mut [E],
    x: &'a [E],
    shift: &'a [E],
    scale: &'a [E],
}

impl<E: Element> SimdKernel for LayerNormForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.norm.width;
        let rows = self.x[self.first * width..].chunks_exact(width);
        for (row, (out, x)) in self.out.chunks_exact_mut(width).zip(rows).enumerate() {
            let start = (self.first + row) / self.norm.tokens * width;
            let shift = &self.shift[start..][..width];
            let scale = &self.scale[start..][..width];
            let (mean, factor) = statistics(x, self.norm.eps);
            for (((out, x), shift), scale) in out.iter_mut().zip(x).zip(shift).zip(scale) {
                let normed = (x.load() - mean) * factor;
                *out = E::store(normed.times_plus::<L>(scale.load() + E::Work::ONE, shift.load()));
            }
        }
    }
}

/// With y = (x - mean) · factor and h = grad · (1 + scale): factor · (h - mean h - y · mean(h y)).
struct LayerNormBackward<'a, E> {
    norm: LayerNormOp,
    first: usize,
    out: &'a mut [E],
    x: &'a [E],
    scale: &'a [E],
    grad: &'a [E],
}

impl<E: Element> SimdKernel for LayerNormBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.norm.width;
        let rows = self.first * width..;
        let inputs = self.x[rows.clone()].chunks_exact(width).zip(self.grad[rows].chunks_exact(width));
        for (row, (out, (x, grad))) in self.out.chunks_exact_mut(width).zip(inputs).enumerate() {
            let start = (self.first + row) / self.norm.tokens * width;
            backward_row::<L, E>(out, x, grad, &self.scale[start..][..width], self.norm.eps);
        }
    }
}

#[inline(always)]
fn backward_row<L: Isa, E: Element>(out: &mut [E], x: &[E], grad: &[E], scale: &[E], eps: f64) {
    let (mean, factor) = statistics(x, eps);
    let count = E::Work::cast(x.len() as f64);
    let scaled = |grad: E, scale: E| grad.load() * (scale.load() + E::Work::ONE);
    let mean_scaled = sum_over([grad, scale, x], |grad, scale, _| scaled(grad, scale)) / count;
    let product = sum_over([grad, scale, x], |grad, scale, x| scaled(grad, scale) * (x.load() - mean));
    let mean_product = product * factor / count;
    for (((out, x), grad), scale) in out.iter_mut().zip(x).zip(grad).zip(scale) {
        let normed = (x.load() - mean) * factor;
        let rest = scaled(*grad, *scale) - mean_scaled;
        *out = E::store(factor * (-normed).times_plus::<L>(mean_product, rest));
    }
}

/// sums += grad · norm(x), row by row.
struct SumNormedRows<'a, E: Element> {
    eps: f64,
    sums: &'a mut [E::Work],
    x: &'a [E],
    grad: &'a [E],
}

impl<E: Element> SimdKernel for SumNormedRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.sums.len();
        for (x, grad) in self.x.chunks_exact(width).zip(self.grad.chunks_exact(width)) {
            let (mean, factor) = statistics(x, self.eps);
            for ((sum, x), grad) in self.sums.iter_mut().zip(x).zip(grad) {
                *sum = grad.load().times_plus::<L>((x.load() - mean) * factor, *sum);
            }
        }
    }
}
