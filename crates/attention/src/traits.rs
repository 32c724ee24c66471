//! [`SpatialAttention`]: what one layer does between its projections.

use crate::Geometry;
use candle_core::{Result, Tensor};

/// Queries, keys and values of one stream, after normalisation and rotation.
///
/// # Shapes
/// Each (batch, tokens, heads, head_dim), contiguous. Image tokens stand in the geometry's tile order.
#[derive(Debug, Clone)]
pub struct Qkv {
    /// Queries.
    pub query: Tensor,
    /// Keys.
    pub key: Tensor,
    /// Values.
    pub value: Tensor,
}

/// What attention gives back, stream by stream.
///
/// # Shapes
/// Each (batch, tokens, heads, head_dim).
#[derive(Debug, Clone)]
pub struct Attended {
    /// The image stream, in tile order.
    pub image: Tensor,
    /// The text stream, where the layer has one.
    pub text: Option<Tensor>,
}

/// Attention of one layer: softmax(q kᵀ / √head_dim) v over the keys its policy lets each query see.
pub trait Attention: Send + Sync {
    /// Attends; differentiable in every tensor of `image` and `text`. Image and text stay apart, so families of either
    /// order share it and any text length works.
    ///
    /// # Errors
    /// Shapes that contradict each other or `geometry`.
    fn attend(&self, image: &Qkv, text: Option<&Qkv>, geometry: &Geometry) -> Result<Attended>;
}
