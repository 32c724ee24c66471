//! [`PixartConfig`]: sizes of a PixArt transformer, from its config.json.

use crate::Result;
use crate::config_keys::ConfigKeys;
use serde_json::Value;

/// Sizes of a PixArt transformer. Absent keys have the defaults of diffusers' `PixArtTransformer2DModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct PixartConfig {
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
    /// Channels of a text token.
    pub text_channels: usize,
    /// Whether resolution and aspect ratio are embedded (`use_additional_conditions`).
    pub size_conditions: bool,
    /// Divisor of the coordinates in position embeddings.
    pub interpolation_scale: f64,
    /// Epsilon of a block's norms.
    pub norm_eps: f64,
}

impl PixartConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// A key of the wrong type, or sizes out of range.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let sample_size = keys.count("sample_size", 128)?;
        let read = Self {
            sample_size,
            patch_size: keys.count("patch_size", 2)?,
            in_channels: keys.count("in_channels", 4)?,
            blocks: keys.count("num_layers", 28)?,
            heads: keys.count("num_attention_heads", 16)?,
            head_dim: keys.count("attention_head_dim", 72)?,
            text_channels: keys.count("caption_channels", 4096)?,
            size_conditions: keys.flag("use_additional_conditions", sample_size == 128)?,
            interpolation_scale: keys.number("interpolation_scale", (sample_size / 64).max(1) as f64)?,
            norm_eps: keys.number("norm_eps", 1e-6)?,
        };
        keys.expect_heads(read.heads, read.head_dim)?;
        keys.expect_patch_size(read.patch_size)?;
        Ok(read)
    }

    /// Channels of a token inside the transformer.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}
