//! [`FluxConfig`]: sizes of a FLUX transformer, from its config.json.

use super::latents::PATCH_SIZE;
use crate::Result;
use crate::config_keys::{ConfigKeys, bad};
use serde_json::Value;

/// Latent pixels that are packed into one token.
pub(super) const LATENTS_PER_TOKEN: usize = PATCH_SIZE * PATCH_SIZE;

/// Sizes of a FLUX transformer. Absent keys have the defaults of diffusers' `FluxTransformer2DModel`, which are those
/// of FLUX.1-schnell: the config.json of FLUX.1 lacks several keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FluxConfig {
    /// Channels of a packed latent token.
    pub in_channels: usize,
    /// Number of double-stream blocks.
    pub double_blocks: usize,
    /// Number of single-stream blocks.
    pub single_blocks: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Channels of a text token.
    pub text_channels: usize,
    /// Channels of the pooled text.
    pub pooled_channels: usize,
    /// Whether the guidance scale is embedded (`guidance_embeds`).
    pub guidance: bool,
    /// Channels of a head that encode each of the three axes of the ids (`axes_dims_rope`).
    pub rope_axes: Vec<usize>,
}

impl FluxConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// A key of the wrong type, or sizes that contradict each other.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let read = Self {
            in_channels: keys.count("in_channels", 64)?,
            double_blocks: keys.count("num_layers", 19)?,
            single_blocks: keys.count("num_single_layers", 38)?,
            heads: keys.count("num_attention_heads", 24)?,
            head_dim: keys.count("attention_head_dim", 128)?,
            text_channels: keys.count("joint_attention_dim", 4096)?,
            pooled_channels: keys.count("pooled_projection_dim", 768)?,
            guidance: keys.flag("guidance_embeds", false)?,
            rope_axes: keys.counts("axes_dims_rope", &[16, 56, 56])?,
        };
        keys.expect_heads(read.heads, read.head_dim)?;
        read.check()
    }

    /// Channels of a token inside the transformer.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn check(self) -> Result<Self> {
        let axes = &self.rope_axes;
        let head_dim = self.head_dim;
        if axes.len() != 3 || axes.iter().any(|axis| axis % 2 == 1) || axes.iter().sum::<usize>() != head_dim {
            let expected = format!("expected three even numbers that sum to attention_head_dim = {head_dim}");
            return Err(bad("axes_dims_rope", format!("{expected}, found {axes:?}")));
        }
        match self.in_channels % LATENTS_PER_TOKEN {
            0 => Ok(self),
            _ => Err(bad("in_channels", format!("expected a multiple of 4, found {}", self.in_channels))),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_empty_config_is_flux_1_schnell() {
        let config = FluxConfig::new(&json!({})).unwrap();
        assert_eq!((config.width(), config.double_blocks, config.single_blocks), (3072, 19, 38));
        assert!(!config.guidance);
    }

    #[test]
    fn contradictions_are_errors() {
        let cases = [
            (json!({"attention_head_dim": 64}), "axes_dims_rope"),
            (json!({"axes_dims_rope": [16, 57, 55]}), "even"),
            (json!({"attention_head_dim": 2, "axes_dims_rope": [2, 0, 0]}), "expected 4 to 256"),
            (json!({"num_attention_heads": 0}), "at least 1"),
            (json!({"in_channels": 66}), "expected a multiple of 4, found 66"),
            (json!({"num_layers": 1.5}), "whole number"),
            (json!({"guidance_embeds": "yes"}), "true or false"),
        ];
        for (config, expected) in cases {
            let error = FluxConfig::new(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
