//! [`TiledAttention`]: attention of a [`Window`] as one fused operation on the CPU, with its backward.
//!
//! Queries are taken 32 at a time, side by side in the lanes of a vector, and see runs of keys: whole ones without a
//! mask, edge ones with it. Softmax is online (Milakov and Gimelshein, algorithm 3), backward recomputes probabilities
//! from the maximum and sum of each query (FlashAttention-2, algorithm 2): memory grows with the tokens alone. Knows no
//! policy.

mod backward;
#[cfg(feature = "cuda")]
mod cuda;
mod forward;
mod operation;
mod problem;
mod scores;
mod sums;
mod workspaces;

use crate::sequence::JointSequence;
use crate::{Attended, Attention, Geometry, Qkv, Window, reference};
#[cfg(feature = "cuda")]
use candle_core::bail;
use candle_core::{CustomOp3, DType, Result, Tensor};
use clearform_ops::simd::CpuFeatures;
use operation::AttentionOp;
use problem::Problem;

#[cfg(feature = "cuda")]
pub(crate) use cuda::Known as KnownLists;

/// Attention of a window: a fused kernel where there is one for the device and the number format, and elsewhere the
/// plain reference. [`AttentionPlan`](crate::AttentionPlan) builds it; by itself it serves whoever chooses the
/// instructions.
#[derive(Debug, Clone)]
pub struct TiledAttention {
    window: Window,
    features: CpuFeatures,
}

impl TiledAttention {
    /// Attention of `window` with the best instructions of this processor.
    pub fn new(window: Window) -> Self {
        Self { window, features: CpuFeatures::detect() }
    }

    /// Computes with `instructions` where it computes on the CPU.
    #[must_use]
    pub fn with_instructions(self, features: CpuFeatures) -> Self {
        Self { features, ..self }
    }

    fn over(&self, sequence: &JointSequence, geometry: &Geometry) -> Result<Tensor> {
        let (device, dtype) = (sequence.query.device(), sequence.query.dtype());
        if device.is_cpu() && dtype == DType::F16 {
            return self.over(&sequence.to_dtype(DType::F32)?, geometry)?.to_dtype(dtype);
        }
        if device.is_cpu() && matches!(dtype, DType::F32 | DType::F64 | DType::BF16) {
            let problem = Problem::new(sequence, geometry, self.window.radius, self.features)?;
            return apply(sequence, AttentionOp::new(problem));
        }
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            match cuda::attend(sequence, geometry, self.window.radius)? {
                Ok(out) => return Ok(out),
                Err(refusal) if sequence.image > PLAIN => bail!("{}", cuda::explained(refusal)),
                Err(_) => {}
            }
        }
        reference::over(sequence, geometry, &self.window)
    }
}

impl Attention for TiledAttention {
    fn attend(&self, image: &Qkv, text: Option<&Qkv>, geometry: &Geometry) -> Result<Attended> {
        let sequence = JointSequence::new(image, text, geometry, &self.window)?;
        sequence.split(&self.over(&sequence, geometry)?, text.is_some())
    }
}

/// Image tokens up to which the plain reference, which costs their square, stands in for a kernel on a GPU.
#[cfg(feature = "cuda")]
const PLAIN: usize = 4096;

fn apply(sequence: &JointSequence, operation: impl CustomOp3 + Send + Sync + 'static) -> Result<Tensor> {
    let (query, key, value) = (&sequence.query, &sequence.key, &sequence.value);
    query.contiguous()?.apply_op3(&key.contiguous()?, &value.contiguous()?, operation)
}

#[cfg(test)]
mod tests;
