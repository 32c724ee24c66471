//! What linear layers of every kind of weight need to know of x: its rows, the shape of the output, and how a bias is added.

use crate::kernel::for_rows;
use crate::simd::{Element, Isa, SimdKernel, dispatch};
use candle_core::{CpuStorage, Layout, Shape};

pub(crate) type StorageRef<'a> = (&'a CpuStorage, &'a Layout);

/// The shape of x with `channels` channels.
pub(crate) fn with_channels(x: &Layout, channels: usize) -> Shape {
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(channels);
    shape.into()
}

/// Rows of x, counted from its shape because they may be empty.
pub(crate) fn row_count(x: &Layout) -> usize {
    x.dims().iter().rev().skip(1).product()
}

/// Adds `bias` to every row of `out`.
pub(crate) fn add_rows<E: Element>(out: &mut [E], bias: &[E]) {
    for_rows(out, bias.len(), |_, out| dispatch(AddRows { out, bias }));
}

struct AddRows<'a, E> {
    out: &'a mut [E],
    bias: &'a [E],
}

impl<E: Element> SimdKernel for AddRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for out in self.out.chunks_exact_mut(self.bias.len()) {
            for (out, bias) in out.iter_mut().zip(self.bias) {
                *out = E::store(out.load() + bias.load());
            }
        }
    }
}
