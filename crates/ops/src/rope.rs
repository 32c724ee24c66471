//! [`rope`]: rotary position embedding, and the angles that [`rms_norm_rope`](crate::rms_norm_rope) shares with it.

use crate::kernel::{self, CpuKernel, for_rows};
use crate::reference;
use crate::simd::{Element, Isa, SimdKernel, dispatch};
use candle_core::{DType, Result, Tensor, bail};

/// Rotary position embedding on interleaved pairs (RoFormer, arXiv 2104.09864, eq. 34). The cosines and sines are
/// constants and get no gradient.
///
/// # Shapes
/// x (batch, tokens, heads, head_dim), cos and sin (tokens, head_dim / 2) -> as x.
///
/// # Errors
/// Shapes that contradict each other, or an odd head_dim.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !kernel::supported(x) {
        return reference::rope(x, cos, sin);
    }
    kernel::apply(RopeOp(RotaryAngles::of(x, cos, sin)?), &[x])
}

/// Cosines and sines for x (batch, tokens, heads, head_dim), (tokens, head_dim / 2) each.
#[derive(Clone)]
pub(crate) struct RotaryAngles {
    cos: Tensor,
    sin: Tensor,
    heads: usize,
    tokens: usize,
    pub head_dim: usize,
}

impl RotaryAngles {
    /// The angles for `x`, in the precision in which it is computed.
    ///
    /// # Errors
    /// Tables that do not fit `x`.
    pub fn of(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Self> {
        let (_, tokens, heads, head_dim) = x.dims4()?;
        let table = [tokens, head_dim / 2];
        if cos.dims() != table || sin.dims() != table || head_dim % 2 == 1 {
            bail!("rope: x {:?}, cos {:?}, sin {:?}", x.dims(), cos.dims(), sin.dims());
        }
        let work = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let table = |tensor: &Tensor| tensor.detach().to_dtype(work);
        Ok(Self { cos: table(cos)?, sin: table(sin)?, heads, tokens, head_dim })
    }

    /// The opposite angles: the inverse rotation, which is its transpose.
    pub fn inverse(&self) -> Result<Self> {
        Ok(Self { sin: self.sin.neg()?, ..self.clone() })
    }

    /// The cosines and sines, each (tokens · head_dim / 2), in the type that rows of `E` are rotated in.
    pub fn tables<E: Element>(&self) -> Result<[Vec<E::Work>; 2]> {
        Ok([self.cos.flatten_all()?.to_vec1()?, self.sin.flatten_all()?.to_vec1()?])
    }

    /// The cosines and sines of row `row` of (batch · tokens · heads, head_dim).
    #[inline(always)]
    pub fn row<'a, T>(&self, [cos, sin]: &'a [Vec<T>; 2], row: usize) -> (&'a [T], &'a [T]) {
        let pairs = self.head_dim / 2;
        let start = row / self.heads % self.tokens * pairs;
        (&cos[start..][..pairs], &sin[start..][..pairs])
    }
}

/// Rotates every row.
pub(crate) struct RopeOp(pub RotaryAngles);

impl CpuKernel for RopeOp {
    const NAME: &'static str = "rope";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let angles = &self.0;
        let mut out = inputs[0].to_vec();
        let tables = &angles.tables::<E>()?;
        for_rows(&mut out, angles.head_dim, |first, out| dispatch(RotateRows { angles, first, out, tables }));
        Ok(out)
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![kernel::gradient(args[0], RopeOp(self.0.inverse()?), &[grad])?])
    }
}

/// Rotates `out` in place; it begins at row `first`.
struct RotateRows<'a, E: Element> {
    angles: &'a RotaryAngles,
    first: usize,
    out: &'a mut [E],
    tables: &'a [Vec<E::Work>; 2],
}

impl<E: Element> SimdKernel for RotateRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (row, out) in self.out.chunks_exact_mut(self.angles.head_dim).enumerate() {
            let (cos, sin) = self.angles.row(self.tables, self.first + row);
            for (pair, (cos, sin)) in out.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                let even = pair[0].load();
                let odd = pair[1].load();
                pair[0] = E::store(even * *cos - odd * *sin);
                pair[1] = E::store(even * *sin + odd * *cos);
            }
        }
    }
}
