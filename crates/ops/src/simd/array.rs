//! [`Array`] and [`PairArray`]: vectors for any instruction set, as arrays that the compiler vectorizes.

use super::Real;
use super::isa::Isa;
use super::pair::{Bf16Pair, PairVector};
use super::vector::{LANES, Vector};
use std::marker::PhantomData;

/// 16 lanes as an array, which the compiler keeps in registers of its choice.
#[derive(Clone, Copy)]
pub struct Array<T, L>([T; LANES], PhantomData<L>);

impl<T: Real, L: Isa> Array<T, L> {
    #[inline(always)]
    fn each(mut self, change: impl Fn(usize, T) -> T) -> Self {
        for lane in 0..LANES {
            self.0[lane] = change(lane, self.0[lane]);
        }
        self
    }
}

impl<T: Real, L: Isa> Vector<T> for Array<T, L> {
    #[inline(always)]
    fn splat(value: T) -> Self {
        Self([value; LANES], PhantomData)
    }

    #[inline(always)]
    fn load(from: &[T; LANES]) -> Self {
        Self(*from, PhantomData)
    }

    #[inline(always)]
    fn store(self, to: &mut [T; LANES]) {
        *to = self.0;
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self.each(|lane, value| value + other.0[lane])
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self.each(|lane, value| value - other.0[lane])
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self.each(|lane, value| value * other.0[lane])
    }

    #[inline(always)]
    fn times_plus(self, a: Self, b: Self) -> Self {
        self.each(|lane, value| value.times_plus::<L>(a.0[lane], b.0[lane]))
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        self.each(|lane, value| if value > other.0[lane] { value } else { other.0[lane] })
    }

    #[inline(always)]
    fn differs(self, other: Self) -> bool {
        self.0 != other.0
    }

    #[inline(always)]
    fn keep(self, keep: u16) -> Self {
        self.each(|lane, value| if keep >> lane & 1 == 1 { value } else { T::MINUS_INFINITY })
    }

    #[inline(always)]
    fn exponential(self) -> Self {
        self.each(|_, value| value.exponential::<L>())
    }
}

/// 16 pairs as an array; each product is two multiply-adds in f32.
#[derive(Clone, Copy)]
pub struct PairArray<L>([Bf16Pair; LANES], PhantomData<L>);

impl<L: Isa> PairVector<Array<f32, L>> for PairArray<L> {
    #[inline(always)]
    fn splat(pair: Bf16Pair) -> Self {
        Self([pair; LANES], PhantomData)
    }

    #[inline(always)]
    fn load(from: &[Bf16Pair; LANES]) -> Self {
        Self(*from, PhantomData)
    }

    #[inline(always)]
    fn multiply_add(self, other: Self, sum: Array<f32, L>) -> Array<f32, L> {
        let mut sums = [0.0; LANES];
        sum.store(&mut sums);
        for ((sum, ours), theirs) in sums.iter_mut().zip(self.0).zip(other.0) {
            let [a, c] = ours.halves();
            let [b, d] = theirs.halves();
            *sum = a.times_plus::<L>(b, c.times_plus::<L>(d, *sum));
        }
        Array::load(&sums)
    }
}
