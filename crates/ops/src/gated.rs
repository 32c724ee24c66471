//! [`gated_add`]: a gated residual connection in one pass.

use crate::kernel::{self, CpuKernel, column_sums, for_rows};
use crate::reference;
use crate::simd::{Element, Isa, Real, SimdKernel, dispatch};
use candle_core::{Result, Shape, Tensor, bail};
use std::ops::Range;

/// residual + gate · x: the gated residual connection of adaLN-Zero (DiT, section 3.2).
///
/// # Shapes
/// residual and x (batch, tokens, width), gate (batch, width) -> as x.
///
/// # Errors
/// Shapes that contradict each other.
pub fn gated_add(residual: &Tensor, gate: &Tensor, x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(out) = crate::cuda::gated_add(residual, gate, x)? {
        return Ok(out);
    }
    if !kernel::supported(x) || residual.dtype() != x.dtype() {
        return reference::gated_add(residual, gate, x);
    }
    let (batch, tokens, width) = x.dims3()?;
    if residual.dims() != x.dims() || gate.dims() != [batch, width] {
        bail!("gated_add: x {:?}, residual {:?}, gate {:?}", x.dims(), residual.dims(), gate.dims());
    }
    kernel::apply(GatedAddOp { batch, tokens, width }, &[residual, &gate.to_dtype(x.dtype())?, x])
}

#[derive(Clone, Copy)]
struct GatedAddOp {
    batch: usize,
    tokens: usize,
    width: usize,
}

impl CpuKernel for GatedAddOp {
    const NAME: &'static str = "gated_add";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = inputs[0].to_vec();
        for_rows(&mut out, self.width, |first, out| {
            dispatch(GatedAddRows { shape: *self, first, out, gate: inputs[1], x: inputs[2] })
        });
        Ok(out)
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let residual = args[0];
        let gate = args[1];
        let x = args[2];
        Ok(vec![
            residual.track_op().then(|| grad.clone()),
            kernel::gradient(gate, GateGradient(*self), &[grad, x])?,
            kernel::gradient(x, GatedInputGradient(*self), &[grad, gate])?,
        ])
    }
}

struct GatedInputGradient(GatedAddOp);

impl CpuKernel for GatedInputGradient {
    const NAME: &'static str = "gated_add gradient of x";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = vec![E::zero(); inputs[0].len()];
        for_rows(&mut out, self.0.width, |first, out| {
            dispatch(GatedAddRows { shape: self.0, first, out, gate: inputs[1], x: inputs[0] })
        });
        Ok(out)
    }
}

struct GateGradient(GatedAddOp);

impl CpuKernel for GateGradient {
    const NAME: &'static str = "gated_add gradient of the gate";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let GatedAddOp { batch, tokens, width } = self.0;
        let add = |rows: Range<usize>, sums: &mut [E::Work]| {
            let range = rows.start * width..rows.end * width;
            dispatch(SumProducts { sums, a: &inputs[0][range.clone()], b: &inputs[1][range] })
        };
        Ok(column_sums::<E>(batch, tokens, width, add))
    }

    fn shape(&self, _: &Shape) -> Shape {
        (self.0.batch, self.0.width).into()
    }
}

/// out += gate · x, where `out` begins at row `first` of x.
struct GatedAddRows<'a, E> {
    shape: GatedAddOp,
    first: usize,
    out: &'a mut [E],
    gate: &'a [E],
    x: &'a [E],
}

impl<E: Element> SimdKernel for GatedAddRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.shape.width;
        let x = &self.x[self.first * width..];
        for (row, (out, x)) in self.out.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
            let batch = (self.first + row) / self.shape.tokens;
            let gate = &self.gate[batch * width..][..width];
            for ((out, x), gate) in out.iter_mut().zip(x).zip(gate) {
                *out = E::store(x.load().times_plus::<L>(gate.load(), out.load()));
            }
        }
    }
}

/// sums += a · b, row by row.
struct SumProducts<'a, E: Element> {
    sums: &'a mut [E::Work],
    a: &'a [E],
    b: &'a [E],
}

impl<E: Element> SimdKernel for SumProducts<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        let width = self.sums.len();
        for (a, b) in self.a.chunks_exact(width).zip(self.b.chunks_exact(width)) {
            for ((sum, a), b) in self.sums.iter_mut().zip(a).zip(b) {
                *sum = a.load().times_plus::<L>(b.load(), *sum);
            }
        }
    }
}
