//! [`gelu`] in one pass over its input.

use crate::kernel::{self, CpuKernel, GRAIN};
use crate::reference;
use crate::simd::{Element, Isa, Real, SimdKernel, dispatch};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// GELU in its tanh approximation (`torch.nn.functional.gelu(approximate="tanh")`), computed as x / (1 + e^-2u) with
/// u = √(2/π) (x + 0.044715 x³), because ½ (1 + tanh u) = 1 / (1 + e^-2u).
///
/// # Shapes
/// Any.
///
/// # Errors
/// Errors of candle.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(out) = crate::cuda::gelu(x)? {
        return Ok(out);
    }
    if kernel::supported(x) { kernel::apply(GeluOp, &[x]) } else { reference::gelu(x) }
}

struct GeluOp;

impl CpuKernel for GeluOp {
    const NAME: &'static str = "gelu";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = vec![E::zero(); inputs[0].len()];
        let chunks = out.par_chunks_mut(GRAIN).zip(inputs[0].par_chunks(GRAIN));
        chunks.for_each(|(out, x)| dispatch(GeluForward { out, x }));
        Ok(out)
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![kernel::gradient(args[0], GeluGradient, &[args[0], grad])?])
    }
}

struct GeluGradient;

impl CpuKernel for GeluGradient {
    const NAME: &'static str = "gelu gradient";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = inputs[1].to_vec();
        let chunks = out.par_chunks_mut(GRAIN).zip(inputs[0].par_chunks(GRAIN));
        chunks.for_each(|(grad, x)| dispatch(GeluBackward { grad, x }));
        Ok(out)
    }
}

struct GeluForward<'a, E> {
    out: &'a mut [E],
    x: &'a [E],
}

impl<E: Element> SimdKernel for GeluForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            let x = x.load();
            *out = E::store(x * gate::<L, E::Work>(x));
        }
    }
}

struct GeluBackward<'a, E> {
    grad: &'a mut [E],
    x: &'a [E],
}

impl<E: Element> SimdKernel for GeluBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (grad, x) in self.grad.iter_mut().zip(self.x) {
            let x = x.load();
            let gate = gate::<L, E::Work>(x);
            let steepness =
                E::Work::cast(2.0 * SLOPE) * (x * x).times_plus::<L>(E::Work::cast(3.0 * CUBIC), E::Work::ONE);
            let slope = (x * steepness).times_plus::<L>(gate * (E::Work::ONE - gate), gate);
            *grad = E::store(grad.load() * slope);
        }
    }
}

/// √(2/π).
const SLOPE: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044715;

/// ½ (1 + tanh u).
#[inline(always)]
fn gate<L: Isa, T: Real>(x: T) -> T {
    let double = x * T::cast(-2.0 * SLOPE) * (x * x).times_plus::<L>(T::cast(CUBIC), T::ONE);
    T::ONE / (T::ONE + double.exponential::<L>())
}
