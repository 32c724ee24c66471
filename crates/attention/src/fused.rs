//! [`TiledAttention`]: attention of a [`Window`] as one fused operation, with its backward.
//!
//! On the CPU a tile is 32 queries, one per lane. It visits runs of keys, with a mask only at the edge of the disc.
//! Softmax is online (Milakov and Gimelshein, algorithm 3), and the backward recomputes probabilities from the maximum
//! and sum of each query (FlashAttention-2, algorithm 2), so memory grows with the number of tokens, not its square.

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
use clearform_ops::ProductPrecision;
use clearform_ops::simd::CpuFeatures;
use operation::AttentionOp;
use problem::Problem;

/// Attention of a window by a fused kernel, for the dtypes that there is one for on the device. It is usually
/// built by an [`AttentionPlan`](crate::AttentionPlan).
#[derive(Debug, Clone)]
pub struct TiledAttention {
    window: Window,
    features: CpuFeatures,
    products: ProductPrecision,
}

impl TiledAttention {
    /// Attention of `window` with the best instruction set of this processor.
    pub fn new(window: Window) -> Self {
        Self { window, features: CpuFeatures::detect(), products: ProductPrecision::Full }
    }

    /// Uses another instruction set of this processor on the CPU.
    #[must_use]
    pub fn with_features(self, features: CpuFeatures) -> Self {
        Self { features, ..self }
    }

    /// Multiplies f32 in another precision on the CPU.
    #[must_use]
    pub fn with_products(self, products: ProductPrecision) -> Self {
        Self { products, ..self }
    }

    fn attend_joint(&self, sequence: &JointSequence, geometry: &Geometry) -> Result<Tensor> {
        let device = sequence.query.device();
        let dtype = sequence.query.dtype();
        if device.is_cpu() && dtype == DType::F16 {
            return self.attend_joint(&sequence.to_dtype(DType::F32)?, geometry)?.to_dtype(dtype);
        }
        if device.is_cpu() && matches!(dtype, DType::F32 | DType::F64 | DType::BF16) {
            let problem = Problem::new(sequence, geometry, self.window.radius, self.features)?;
            let pairs = self.features.multiplies_pairs(dtype, self.products);
            return apply(sequence, AttentionOp::new(problem, pairs));
        }
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            // The reference would make a mask of tokens x tokens on the host, in every layer and step.
            return match cuda::attend(sequence, geometry, self.window.radius)? {
                Ok(out) => Ok(out),
                Err(refusal) => bail!("{}", cuda::explain(refusal)),
            };
        }
        reference::attend_joint(sequence, geometry, &self.window)
    }
}

impl Attention for TiledAttention {
    fn attend(&self, image: Qkv, text: Option<Qkv>, geometry: &Geometry) -> Result<Attended> {
        let has_text = text.is_some();
        let sequence = JointSequence::new(image, text, geometry, &self.window)?;
        sequence.split(&self.attend_joint(&sequence, geometry)?, has_text)
    }
}

/// Gradients of query, key and value, of those that are tracked.
type QkvGradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

fn apply(sequence: &JointSequence, operation: impl CustomOp3 + Send + Sync + 'static) -> Result<Tensor> {
    let query = &sequence.query;
    let key = &sequence.key;
    let value = &sequence.value;
    query.contiguous()?.apply_op3(&key.contiguous()?, &value.contiguous()?, operation)
}

#[cfg(test)]
mod tests;
