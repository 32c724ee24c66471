//! [`Autoencoder`]: images to latents and back, whatever the class.

use super::tiles::TileProgress;
use crate::{ImageSize, Result};
use candle_core::Tensor;
use clearform_weights::TensorSource;
use std::ops::ControlFlow;

/// An autoencoder with its weights loaded.
pub trait Autoencoder: Send + Sync {
    /// Latents of `images`, scaled as the transformer takes them.
    ///
    /// # Shapes
    /// (batch, 3, height, width) in -1..1 -> (batch, channels, height / downscale, width / downscale) in f32.
    ///
    /// # Errors
    /// A rank or number of channels that is not that of an image.
    fn encode(&self, images: &Tensor) -> Result<Tensor>;

    /// As [`Self::encode`], but scaled only and not shifted, as some ControlNets take their control.
    ///
    /// # Shapes
    /// As [`Self::encode`].
    ///
    /// # Errors
    /// As [`Self::encode`].
    fn encode_unshifted(&self, images: &Tensor) -> Result<Tensor>;

    /// Images of scaled latents. Values are about -1..1 and not clamped.
    ///
    /// # Shapes
    /// (batch, channels, height, width) -> (batch, 3, height · downscale, width · downscale) in f32.
    ///
    /// # Errors
    /// Another number of channels.
    fn decode(&self, latents: &Tensor) -> Result<Tensor>;

    /// As [`Self::decode`], in tiles of `tile` latent pixels a side, whose memory does not grow with the image.
    /// `progress` is called after each tile and may cancel, which gives `None`.
    ///
    /// # Shapes
    /// As [`Self::decode`], on the CPU.
    ///
    /// # Errors
    /// As [`Self::decode`].
    fn decode_in_tiles(
        &self,
        latents: &Tensor,
        tile: usize,
        progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
    ) -> Result<Option<Tensor>>;
}

/// An autoencoder of given sizes, without weights.
pub trait AutoencoderSpec: Send + Sync {
    /// Channels of the latents.
    fn latent_channels(&self) -> usize;

    /// Width and height of a latent pixel in image pixels (`vae_scale_factor`).
    fn downscale(&self) -> usize;

    /// Width and height of the training images, if the config states it.
    fn sample_size(&self) -> Option<usize>;

    /// Elements of the largest tensor that appears while an image of this size in pixels is decoded.
    fn largest_activation(&self, image: ImageSize) -> usize;

    /// Builds the autoencoder from `source`, with the tensor names of its class.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    fn build(&self, source: &dyn TensorSource) -> Result<Box<dyn Autoencoder>>;
}
