//! [`silu`] and [`swiglu`], each in one pass over its inputs.

use crate::kernel::{self, CpuKernel, GRAIN};
use crate::reference;
use crate::simd::{Element, Isa, Real, SimdKernel, dispatch};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// x / (1 + e^-x) (`torch.nn.functional.silu`).
///
/// # Shapes
/// Any.
///
/// # Errors
/// Errors of candle.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if kernel::supported(x) { kernel::apply(SiluOp, &[x]) } else { x.silu() }
}

/// silu(gate) · x: the gate of SwiGLU (Shazeer, arXiv 2002.05202).
///
/// # Shapes
/// gate and x of one shape -> the same.
///
/// # Errors
/// Shapes that differ.
pub fn swiglu(gate: &Tensor, x: &Tensor) -> Result<Tensor> {
    if !kernel::supported(gate) || gate.dtype() != x.dtype() {
        return reference::swiglu(gate, x);
    }
    if gate.dims() != x.dims() {
        bail!("swiglu: gate {:?}, x {:?}", gate.dims(), x.dims());
    }
    kernel::apply(SwigluOp, &[gate, x])
}

struct SiluOp;

impl CpuKernel for SiluOp {
    const NAME: &'static str = "silu";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = inputs[0].to_vec();
        out.par_chunks_mut(GRAIN).for_each(|out| dispatch(SiluRows { out }));
        Ok(out)
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let ones = grad.ones_like()?;
        Ok(vec![kernel::gradient(args[0], SwigluGateGradient, &[args[0], &ones, grad])?])
    }
}

struct SwigluOp;

impl CpuKernel for SwigluOp {
    const NAME: &'static str = "swiglu";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        Ok(map_chunks(inputs[1], [inputs[0]; 2], |out, [gate, _]| dispatch(GateRows { out, gate })))
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![
            kernel::gradient(args[0], SwigluGateGradient, &[args[0], args[1], grad])?,
            kernel::gradient(args[1], SwigluOp, &[args[0], grad])?,
        ])
    }
}

struct SwigluGateGradient;

impl CpuKernel for SwigluGateGradient {
    const NAME: &'static str = "swiglu gradient of the gate";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        Ok(map_chunks(inputs[2], [inputs[0], inputs[1]], |out, [gate, x]| dispatch(SlopeRows { out, gate, x })))
    }
}

/// A copy of `first`, each part of which `fill` changes, given the same part of `others`.
fn map_chunks<E: Element>(first: &[E], others: [&[E]; 2], fill: impl Fn(&mut [E], [&[E]; 2]) + Sync) -> Vec<E> {
    let mut out = first.to_vec();
    let parts = others[0].par_chunks(GRAIN).zip(others[1].par_chunks(GRAIN));
    out.par_chunks_mut(GRAIN).zip(parts).for_each(|(out, (a, b))| fill(out, [a, b]));
    out
}

/// out = silu(out).
struct SiluRows<'a, E> {
    out: &'a mut [E],
}

impl<E: Element> SimdKernel for SiluRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for out in self.out.iter_mut() {
            let value = out.load();
            *out = E::store(value * logistic::<L, E::Work>(value));
        }
    }
}

/// out = silu(gate) · out.
struct GateRows<'a, E> {
    out: &'a mut [E],
    gate: &'a [E],
}

impl<E: Element> SimdKernel for GateRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (out, gate) in self.out.iter_mut().zip(self.gate) {
            let gate = gate.load();
            *out = E::store(out.load() * gate * logistic::<L, E::Work>(gate));
        }
    }
}

/// out = silu'(gate) · x · out, where silu' = σ (1 + z (1 - σ)).
struct SlopeRows<'a, E> {
    out: &'a mut [E],
    gate: &'a [E],
    x: &'a [E],
}

impl<E: Element> SimdKernel for SlopeRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (out, (gate, x)) in self.out.iter_mut().zip(self.gate.iter().zip(self.x)) {
            let gate = gate.load();
            let sigma = logistic::<L, E::Work>(gate);
            let slope = sigma * gate.times_plus::<L>(E::Work::ONE - sigma, E::Work::ONE);
            *out = E::store(out.load() * x.load() * slope);
        }
    }
}

/// 1 / (1 + e^-z).
#[inline(always)]
fn logistic<L: Isa, T: Real>(z: T) -> T {
    T::ONE / (T::ONE + (-z).exponential::<L>())
}
