//! [`Windowed`]: attention of a [`Window`] as one fused operation on the CPU, with its backward.
//!
//! Queries are taken 32 at a time, side by side in the lanes of a vector, and see runs of keys: whole ones without a
//! mask, edge ones with it. Softmax is online (Milakov and Gimelshein, algorithm 3), backward recomputes probabilities
//! from the maximum and sum of each query (FlashAttention-2, algorithm 2): memory grows with the tokens alone. Knows no
//! policy.

mod backward;
mod forward;
mod operation;
mod problem;
mod product;
mod step;

use crate::sequence::Sequence;
use crate::{Attended, Attention, Geometry, Qkv, Window, reference};
use candle_core::{DType, Result};
use operation::Softmax;
use problem::Problem;

/// Attention of a window. On the CPU it is the fused kernel, elsewhere the plain reference.
pub(crate) struct Windowed(pub Window);

impl Attention for Windowed {
    fn attend(&self, image: &Qkv, text: Option<&Qkv>, geometry: &Geometry) -> Result<Attended> {
        let known = matches!(image.query.dtype(), DType::F32 | DType::F64 | DType::BF16);
        if !known || !image.query.device().is_cpu() {
            return reference::attend(image, text, geometry, &self.0);
        }
        let sequence = Sequence::new(image, text, geometry, &self.0)?;
        let operation = Softmax::new(Problem::new(&sequence, geometry, self.0.radius)?);
        let (query, key, value) = (&sequence.query, &sequence.key, &sequence.value);
        let out = query.contiguous()?.apply_op3(&key.contiguous()?, &value.contiguous()?, operation)?;
        sequence.split(&out, text.is_some())
    }
}
