//! [`Sd3Config`]: sizes of a Stable Diffusion 3 transformer, from its config.json.

use crate::Result;
use crate::config_keys::{ConfigKeys, bad};
use serde_json::Value;

/// Sizes of an SD3 transformer. Absent keys have the defaults of diffusers' `SD3Transformer2DModel`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sd3Config {
    /// Width and height of the latents in training.
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
    /// Channels of the pooled text.
    pub pooled_channels: usize,
    /// Width and height of the position embedding table in tokens (`pos_embed_max_size`).
    pub max_grid: usize,
    /// Blocks with a second attention over the image only (`dual_attention_layers`, SD 3.5 medium).
    pub dual_blocks: Vec<usize>,
}

impl Sd3Config {
    /// Reads config.json.
    ///
    /// # Errors
    /// A key of the wrong type, or sizes out of range.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let norm = keys.text("qk_norm", "")?;
        if !["", "rms_norm"].contains(&norm) {
            return Err(bad("qk_norm", format!("{norm:?} is not supported, only \"rms_norm\" or none")));
        }
        let read = Self {
            sample_size: keys.count("sample_size", 128)?,
            patch_size: keys.count("patch_size", 2)?,
            in_channels: keys.count("in_channels", 16)?,
            blocks: keys.count("num_layers", 18)?,
            heads: keys.count("num_attention_heads", 18)?,
            head_dim: keys.count("attention_head_dim", 64)?,
            text_channels: keys.count("joint_attention_dim", 4096)?,
            pooled_channels: keys.count("pooled_projection_dim", 2048)?,
            max_grid: keys.count("pos_embed_max_size", 96)?,
            dual_blocks: keys.counts("dual_attention_layers", &[])?,
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
