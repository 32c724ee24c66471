//! [`VaeTiling`]: whether an image is decoded in tiles, and of which size.

use super::AutoencoderSpec;
use crate::ImageSize;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// When images are decoded in tiles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TilingMode {
    /// Where decoding the whole image would take more than about 3 GB of memory.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Whether and how images are decoded in tiles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeTiling {
    /// When.
    #[serde(default)]
    pub mode: TilingMode,
    /// Width and height of a tile, in pixels; `None` is 768.
    #[serde(default)]
    pub tile_size: Option<usize>,
}

/// Width and height of a tile in pixels, by default: with the pixels around it FLUX's VAE decodes it in 1.5 GB.
const TILE: usize = 768;

/// Values of the largest activation of an image that is decoded whole: those of 1024 x 1024 pixels in FLUX's VAE and a
/// tenth more. About two of them are held at a time.
pub(super) const MOST_VALUES: usize = 300_000_000;

impl VaeTiling {
    /// Latent pixels along the side of a tile of an image of this size; `None` if it is decoded whole.
    pub fn tile(self, vae: &dyn AutoencoderSpec, image: ImageSize) -> Option<usize> {
        let is_tiled = match self.mode {
            TilingMode::Auto => vae.largest_activation(image) > MOST_VALUES,
            TilingMode::On => true,
            TilingMode::Off => false,
        };
        is_tiled.then(|| (self.tile_size.unwrap_or(TILE) / vae.downscale().max(1)).max(1))
    }
}

impl FromStr for TilingMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err("expected auto, on or off".to_owned()),
        }
    }
}

impl fmt::Display for TilingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vae::autoencoder;
    use serde_json::json;

    #[test]
    fn large_images_of_wide_models_are_tiled() {
        let square = |edge| ImageSize { height: edge, width: edge };
        let wide = autoencoder(&json!({"latent_channels": 16, "block_out_channels": [128, 256, 512, 512]})).unwrap();
        let small = autoencoder(&json!({"latent_channels": 4, "block_out_channels": [32, 32, 64]})).unwrap();
        let auto = VaeTiling::default();
        assert_eq!([1024, 2048].map(|edge| auto.tile(wide.as_ref(), square(edge))), [None, Some(96)]);
        assert_eq!([1024, 2048].map(|edge| auto.tile(small.as_ref(), square(edge))), [None, None]);
        let of = |mode, tile_size| VaeTiling { mode, tile_size }.tile(wide.as_ref(), square(1024));
        assert_eq!(of(TilingMode::On, Some(512)), Some(64));
        assert_eq!(of(TilingMode::Off, Some(512)), None);
    }
}
