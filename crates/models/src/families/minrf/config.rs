//! [`MinrfConfig`]: the sizes of a minRF transformer, named as the arguments of its class.

use crate::Result;
use crate::config_keys::{ConfigKeys, bad};
use serde_json::Value;

/// Sizes of a minRF transformer. Keys that config.json lacks have the defaults of `DiT_Llama`.
#[derive(Debug, Clone, PartialEq)]
pub struct MinrfConfig {
    /// Edge of the pictures it was trained on.
    pub input_size: usize,
    /// Edge of the square of pixels that make one token.
    pub patch: usize,
    /// Channels of the pictures.
    pub in_channels: usize,
    /// Blocks.
    pub blocks: usize,
    /// Attention heads.
    pub heads: usize,
    /// Channels of a token inside the transformer.
    pub width: usize,
    /// Classes; one more label stands for none of them.
    pub classes: usize,
    /// Added to the variance in a block's norms.
    pub norm_eps: f64,
}

impl MinrfConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// A key of the wrong type, or sizes that contradict each other.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let read = Self {
            input_size: keys.count("input_size", 32)?,
            patch: keys.count("patch_size", 2)?,
            in_channels: keys.count("in_channels", 3)?,
            blocks: keys.count("n_layers", 5)?,
            heads: keys.count("n_heads", 16)?,
            width: keys.count("dim", 512)?,
            classes: keys.count("num_classes", 10)?,
            norm_eps: keys.number("norm_eps", 1e-5)?,
        };
        keys.expect_patch(read.patch)?;
        let head_dim = read.width / read.heads.max(1);
        if read.heads == 0 || head_dim * read.heads != read.width || !head_dim.is_multiple_of(2) {
            let reason =
                format!("expected heads of an even number of channels, found {} of dim {}", read.heads, read.width);
            return Err(bad("n_heads", reason));
        }
        Ok(read)
    }
}
