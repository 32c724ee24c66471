//! Layers that several families share: embeddings, projections, patches and input checks.

mod attention;
mod blocks;
mod convolution;
mod embedding;
mod inputs;
mod patches;
mod positions;
mod token_embedding;

pub(crate) use attention::{QkvProjections, attention, split_heads};
pub(crate) use blocks::{Blocks, TransformerBlock};
pub(crate) use convolution::{Convolution, GroupNorm};
pub(crate) use embedding::{FeedForward, Mlp, modulation, sinusoidal_embedding};
pub(crate) use inputs::{ForwardArguments, checked_batch, class_input, expect, grid, labels};
pub(crate) use patches::{ChannelOrder, PatchEmbed, patchify, to_latents, unpatchify};
pub(crate) use positions::{rotary_tables, sincos_positions};
pub(crate) use token_embedding::TokenEmbedding;

/// The epsilon of layer and RMS norms, unless a class uses another one.
pub(crate) const NORM_EPS: f64 = 1e-6;
