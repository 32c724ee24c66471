//! Attention over an image and a text stream, full or in CLEAR's local window.
//!
//! A model projects, normalizes and rotates queries, keys and values; this crate computes softmax(q kᵀ) v over the keys
//! that each query attends to. [`AttentionPlan`] gives each layer a policy and builds its [`Attention`]; [`Geometry`]
//! has the positions of the image tokens. [`mod@reference`] is the specification, plain tensor algebra over a full
//! mask. On the CPU a fused kernel runs whose memory grows with the number of tokens, not its square. Nothing here
//! knows a model or a file.

#[cfg(feature = "cuda")]
mod device_lists;
mod error;
mod execution;
mod fused;
mod geometries;
mod geometry;
mod grid;
mod plan;
mod policies;
mod pooled_context;
pub mod reference;
mod sequence;
mod tile_efficiency;
mod tiles;
mod traits;
mod window;

pub use error::AttentionError;
pub use execution::{Execution, kernel_lists};
pub use fused::TiledAttention;
pub use geometries::Geometries;
pub use geometry::Geometry;
pub use grid::{TileShape, TokenGrid};
pub use plan::{AttentionPlan, learning_layer};
pub use policies::{POLICIES, Policy, PolicyForm};
pub use tile_efficiency::TileEfficiency;
pub use traits::{Attended, Attention, Qkv};
pub use window::{Radius, Window};
