//! [`DitConfig`]: the sizes of a DiT or SiT, from its config.json.

use crate::Result;
use crate::config_keys::ConfigKeys;
use crate::layers::sincos_positions;
use candle_core::{Device, Tensor};
use serde_json::Value;

/// Sizes of a DiT. Keys that config.json lacks have the defaults of diffusers' `DiTTransformer2DModel`.
#[derive(Debug, Clone, PartialEq)]
pub struct DitConfig {
    /// Edge of the latents it was trained on, which its positions span.
    pub sample_size: usize,
    /// Edge of the square of latent places that make one token.
    pub patch: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// Blocks.
    pub blocks: usize,
    /// Attention heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Classes; one more label stands for none of them.
    pub classes: usize,
    /// Added to the variance before a block's MLP; facebook's code has another than diffusers'.
    pub norm_eps: f64,
    /// The shift of the time's frequencies (see `layers::sinusoids`); facebook's code has another than diffusers'.
    pub frequency_shift: f64,
}

impl DitConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// A key of the wrong type, or sizes that no model has.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let read = Self {
            sample_size: keys.count("sample_size", 32)?,
            patch: keys.count("patch_size", 2)?,
            in_channels: keys.count("in_channels", 4)?,
            blocks: keys.count("num_layers", 28)?,
            heads: keys.count("num_attention_heads", 16)?,
            head_dim: keys.count("attention_head_dim", 72)?,
            classes: keys.count("num_embeds_ada_norm", 1000)?,
            norm_eps: keys.number("norm_eps", 1e-5)?,
            frequency_shift: keys.number("downscale_freq_shift", 1.0)?,
        };
        keys.expect_heads(read.heads, read.head_dim)?;
        keys.expect_patch(read.patch)?;
        Ok(read)
    }

    /// Channels of a token inside the transformer.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Positions of a grid of tokens, (1, tokens, width).
    pub(super) fn positions(&self, grid: (usize, usize), device: &Device) -> Result<Tensor> {
        sincos_positions(grid, self.width(), self.sample_size / self.patch, 1.0, device)
    }
}
