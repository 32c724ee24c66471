//! Layers that three or more families have: embedders, projections and norms. They know no architecture.

mod attention;
mod convolution;
mod embedding;
mod inputs;
mod patches;
mod positions;

pub(crate) use attention::{QkvProjections, attention, block_at, split_heads};
pub(crate) use convolution::Convolution;
pub(crate) use embedding::{FeedForward, Mlp, modulation, sinusoids};
pub(crate) use inputs::{ForwardArguments, checked_batch, class_input, expect, grid, labels};
pub(crate) use patches::{ChannelOrder, Patches, patchify, to_latents, unpatchify};
pub(crate) use positions::{rotary_tables, sincos_positions};

/// Added to the variance where a class does not say otherwise.
pub(crate) const NORM_EPS: f64 = 1e-6;
