//! [`Attention`]: what a layer computes between its projections.

use crate::Geometry;
use candle_core::{Result, Tensor};

/// Queries, keys and values of one stream, after normalization and rotation.
///
/// # Shapes
/// Each (batch, tokens, heads, head_dim), contiguous. Image tokens are in the geometry's tile order.
#[derive(Debug, Clone)]
pub struct Qkv {
    /// Queries.
    pub query: Tensor,
    /// Keys.
    pub key: Tensor,
    /// Values.
    pub value: Tensor,
}

/// The output of attention for each stream.
///
/// # Shapes
/// Each (batch, tokens, heads, head_dim).
#[derive(Debug, Clone)]
pub struct Attended {
    /// The image stream, in tile order.
    pub image: Tensor,
    /// The text stream, if the layer has one.
    pub text: Option<Tensor>,
}

/// Attention of one layer: softmax(q kᵀ / √head_dim) v over the keys that its policy lets each query attend to.
pub trait Attention: Send + Sync {
    /// Attends; differentiable in every tensor of `image` and `text`. The streams are separate arguments, so that the
    /// order in which a model concatenates them does not matter. Their tensors are taken, and released as soon as they
    /// are concatenated: of a large image they are what takes most memory.
    ///
    /// # Errors
    /// Shapes that contradict each other or `geometry`.
    fn attend(&self, image: Qkv, text: Option<Qkv>, geometry: &Geometry) -> Result<Attended>;
}
