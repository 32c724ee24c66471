//! The attention seam.
//!
//! A model projects, normalises and rotates its queries, keys and values once; what is exchanged is only
//! softmax(q kᵀ) v and its neighbourhood. [`AttentionPlan`] says which policy each layer has and builds one
//! [`SpatialAttention`] per layer; [`Geometry`] says where the image tokens lie. [`mod@reference`] is the specification, plain
//! tensor algebra over a full mask; what runs on the CPU is a fused kernel whose memory grows with the tokens, never
//! with their square. Nothing here knows a model or a file.

mod error;
mod execution;
mod fused;
mod geometries;
mod geometry;
mod plan;
mod policies;
mod pool;
pub mod reference;
mod sequence;
mod tile_efficiency;
mod tiles;
mod traits;
mod window;

pub use error::AttentionError;
pub use execution::Execution;
pub use fused::TiledAttention;
pub use geometries::Geometries;
pub use geometry::{Geometry, TokenGrid};
pub use plan::AttentionPlan;
pub use policies::{POLICIES, Policy, PolicyForm};
pub use tile_efficiency::{TileEfficiency, TileShape};
pub use traits::{Attended, Attention, Qkv};
pub use window::{Radius, Window};
