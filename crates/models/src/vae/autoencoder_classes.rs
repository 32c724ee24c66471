//! [`AUTOENCODERS`]: the classes of autoencoders.

use super::autoencoder::{Autoencoder, AutoencoderSpec, VaePrecision};
use super::tiles::TileProgress;
use super::tiny::TinyConfig;
use super::{AutoencoderKl, VaeConfig};
use crate::config_keys::{ConfigKeys, bad};
use crate::{ImageSize, Result};
use candle_core::Tensor;
use clearform_weights::TensorSource;
use serde_json::Value;
use std::ops::ControlFlow;

/// A class of autoencoders.
pub struct AutoencoderClass {
    /// Its name in diffusers, the key `_class_name` of config.json.
    pub name: &'static str,
    /// Reads its config.json.
    pub parse: fn(&Value) -> Result<Box<dyn AutoencoderSpec>>,
}

/// Every class of autoencoders. A config.json without a class name is of the first.
pub const AUTOENCODERS: &[AutoencoderClass] = &[
    AutoencoderClass { name: "AutoencoderKL", parse: |config| Ok(Box::new(VaeConfig::new(config)?)) },
    AutoencoderClass { name: "AutoencoderTiny", parse: |config| Ok(Box::new(TinyConfig::new(config)?)) },
];

/// Reads the config.json of an autoencoder of any class in [`AUTOENCODERS`].
///
/// # Errors
/// A class that is not in the list, a key of the wrong type, or sizes that contradict each other.
pub fn autoencoder(config: &Value) -> Result<Box<dyn AutoencoderSpec>> {
    let found = ConfigKeys::new(config)?.text("_class_name", AUTOENCODERS[0].name)?;
    let class = AUTOENCODERS.iter().find(|class| class.name == found).ok_or_else(|| {
        let known: Vec<&str> = AUTOENCODERS.iter().map(|class| class.name).collect();
        bad("_class_name", format!("{found:?} is not supported, only {}", known.join(", ")))
    })?;
    (class.parse)(config)
}

impl Autoencoder for AutoencoderKl {
    fn encode(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor> {
        Self::encode(self, images, tile)
    }

    fn encode_unshifted(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor> {
        Self::encode_unshifted(self, images, tile)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        Self::decode(self, latents)
    }

    fn decode_in_tiles(
        &self,
        latents: &Tensor,
        tile: usize,
        progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
    ) -> Result<Option<Tensor>> {
        Self::decode_in_tiles(self, latents, tile, progress)
    }
}

impl AutoencoderSpec for VaeConfig {
    fn latent_channels(&self) -> usize {
        self.latent_channels
    }

    fn downscale(&self) -> usize {
        Self::downscale(self)
    }

    fn sample_size(&self) -> Option<usize> {
        self.sample_size
    }

    fn largest_activation(&self, image: ImageSize) -> usize {
        Self::largest_activation(self, image)
    }

    fn build(&self, source: &dyn TensorSource, precision: VaePrecision) -> Result<Box<dyn Autoencoder>> {
        Ok(Box::new(AutoencoderKl::build(self.clone(), source, precision)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The last upsampling of FLUX's VAE, to 256 channels at full size: 2^32 elements at 4096 x 4096 pixels, and padding.
    #[test]
    fn the_largest_activation_is_that_of_the_last_upsampling() {
        let sizes = json!({"latent_channels": 16, "block_out_channels": [128, 256, 512, 512]});
        let spec = autoencoder(&sizes).unwrap();
        let largest = |edge| spec.largest_activation(ImageSize { height: edge, width: edge });
        assert_eq!(largest(4096), 256 * 4098 * 4098);
        assert_eq!(largest(1024), 256 * 1026 * 1026);
        let single = autoencoder(&json!({"latent_channels": 4, "block_out_channels": [64]})).unwrap();
        assert_eq!(single.largest_activation(ImageSize { height: 8, width: 16 }), 64 * 10 * 18);
    }

    #[test]
    fn the_class_decides_who_reads_a_config() {
        let sizes = json!({"latent_channels": 16, "block_out_channels": [32, 32, 32, 32], "sample_size": 512});
        let spec = autoencoder(&sizes).unwrap();
        assert_eq!((spec.latent_channels(), spec.downscale(), spec.sample_size()), (16, 8, Some(512)));
        let error = autoencoder(&json!({"_class_name": "AutoencoderDC"})).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("\"AutoencoderDC\" is not supported, only AutoencoderKL, AutoencoderTiny"), "{error}");
    }
}
