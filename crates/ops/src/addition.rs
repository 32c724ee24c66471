//! [`add`]: a sum of two tensors.

use crate::kernel::{self, CpuKernel, for_rows};
use crate::simd::{Element, Isa, SimdKernel, dispatch};
use candle_core::{DType, Result, Tensor};

/// a + b. In bf16 candle's addition takes 25 times as long as its subtraction on processors of Intel (13.6 ns against 0.5
/// for each element, Emerald Rapids), so that one is computed here.
///
/// # Shapes
/// a and b of the same shape -> as they.
///
/// # Errors
/// Shapes or dtypes that differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let is_own = a.dtype() == DType::BF16 && b.dtype() == DType::BF16 && a.dims() == b.dims() && kernel::supported(a);
    if is_own { kernel::apply(AddOp, &[a, b]) } else { a + b }
}

struct AddOp;

impl CpuKernel for AddOp {
    const NAME: &'static str = "add";

    fn forward<E: Element>(&self, inputs: &[&[E]]) -> Result<Vec<E>> {
        let mut out = inputs[0].to_vec();
        for_rows(&mut out, 1, |first, out| {
            let values = &inputs[1][first..];
            dispatch(AddTo { out, values });
        });
        Ok(out)
    }

    fn backward(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(args.iter().map(|arg| arg.track_op().then(|| grad.clone())).collect())
    }
}

/// out += values.
struct AddTo<'a, E> {
    out: &'a mut [E],
    values: &'a [E],
}

impl<E: Element> SimdKernel for AddTo<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for (out, value) in self.out.iter_mut().zip(self.values) {
            *out = E::store(out.load() + value.load());
        }
    }
}
