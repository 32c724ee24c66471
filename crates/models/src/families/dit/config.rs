//! [`DitConfig`]: sizes of a DiT or SiT, from its config.json.

use crate::Result;
use crate::config_keys::ConfigKeys;
use crate::layers::sincos_positions;
use candle_core::{Device, Tensor};
use serde_json::Value;

/// Sizes of a DiT. Absent keys have the defaults of diffusers' `DiTTransformer2DModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct DitConfig {
    /// Width and height of the latents in training. Position embeddings are relative to it.
    pub sample_size: usize,
    /// Width and height of a token in latent pixels.
    pub patch_size: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Number of classes. One more label means no class (unconditional).
    pub classes: usize,
    /// Epsilon of the norm before a block's MLP. The original code has 1e-6, diffusers 1e-5.
    pub norm_eps: f64,
    /// `downscale_freq_shift` of the timestep embedding. The original code has 0, diffusers 1.
    pub frequency_shift: f64,
}

impl DitConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// A key of the wrong type, or sizes out of range.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let read = Self {
            sample_size: keys.count("sample_size", 32)?,
            patch_size: keys.count("patch_size", 2)?,
            in_channels: keys.count("in_channels", 4)?,
            blocks: keys.count("num_layers", 28)?,
            heads: keys.count("num_attention_heads", 16)?,
            head_dim: keys.count("attention_head_dim", 72)?,
            classes: keys.count("num_embeds_ada_norm", 1000)?,
            norm_eps: keys.number("norm_eps", 1e-5)?,
            frequency_shift: keys.number("downscale_freq_shift", 1.0)?,
        };
        keys.expect_heads(read.heads, read.head_dim)?;
        keys.expect_patch_size(read.patch_size)?;
        Ok(read)
    }

    /// Channels of a token inside the transformer.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Position embeddings of a grid of (rows, columns) tokens: (1, tokens, width).
    pub(super) fn positions(&self, grid: (usize, usize), device: &Device) -> Result<Tensor> {
        sincos_positions(grid, self.width(), self.sample_size / self.patch_size, 1.0, device)
    }
}
