//! [`MinrfConfig`]: sizes of a minRF transformer, under the names of its class's arguments.

use crate::Result;
use crate::config_keys::{ConfigKeys, bad};
use serde_json::Value;

/// Sizes of a minRF transformer. Absent keys have the defaults of `DiT_Llama`.
#[derive(Debug, Clone, PartialEq)]
pub struct MinrfConfig {
    /// Width and height of the training images.
    pub input_size: usize,
    /// Width and height of a token in pixels.
    pub patch_size: usize,
    /// Channels of the images.
    pub in_channels: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Channels of a token inside the transformer.
    pub width: usize,
    /// Number of classes. One more label means no class (unconditional).
    pub classes: usize,
    /// Epsilon of a block's norms.
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
            patch_size: keys.count("patch_size", 2)?,
            in_channels: keys.count("in_channels", 3)?,
            blocks: keys.count("n_layers", 5)?,
            heads: keys.count("n_heads", 16)?,
            width: keys.count("dim", 512)?,
            classes: keys.count("num_classes", 10)?,
            norm_eps: keys.number("norm_eps", 1e-5)?,
        };
        keys.expect_patch_size(read.patch_size)?;
        let head_dim = read.width / read.heads.max(1);
        if read.heads == 0 || head_dim * read.heads != read.width || !head_dim.is_multiple_of(2) {
            let reason =
                format!("expected a divisor of dim = {} that leaves even heads, found {}", read.width, read.heads);
            return Err(bad("n_heads", reason));
        }
        Ok(read)
    }
}
