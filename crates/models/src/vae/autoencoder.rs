//! [`Autoencoder`]: images to latents and back, whatever the class.

use super::tiles::TileProgress;
use crate::{ImageSize, Result};
use candle_core::{DType, Device, Tensor};
use clearform_ops::has_bf16_products;
use clearform_weights::TensorSource;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;

/// What the 3 x 3 convolutions of an autoencoder multiply. Sums, and what is stored between layers, are f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VaePrecision {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16, on CPUs with instructions for it (AMX, or AVX-512 BF16 of AMD); as f32 elsewhere.
    Bf16,
}

impl VaePrecision {
    /// What `device` computes with: this, or f32 where bf16 gains nothing.
    #[must_use]
    pub fn on(self, device: &Device) -> Self {
        if device.is_cpu() && has_bf16_products() { self } else { Self::F32 }
    }

    /// The dtype that weights are held in.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl FromStr for VaePrecision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err("expected f32 or bf16".to_owned()),
        }
    }
}

impl fmt::Display for VaePrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.dtype().as_str())
    }
}

/// An autoencoder with its weights loaded.
pub trait Autoencoder: Send + Sync {
    /// Latents of `images`, scaled as the transformer takes them. With `tile` they are encoded in tiles of so many latent
    /// pixels a side, whose memory does not grow with the image.
    ///
    /// # Shapes
    /// (batch, 3, height, width) in -1..1 -> (batch, channels, height / downscale, width / downscale) in f32.
    ///
    /// # Errors
    /// A rank or number of channels that is not that of an image.
    fn encode(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor>;

    /// As [`Self::encode`], but scaled only and not shifted, as some ControlNets take their control.
    ///
    /// # Shapes
    /// As [`Self::encode`].
    ///
    /// # Errors
    /// As [`Self::encode`].
    fn encode_unshifted(&self, images: &Tensor, tile: Option<usize>) -> Result<Tensor>;

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
    fn build(&self, source: &dyn TensorSource, precision: VaePrecision) -> Result<Box<dyn Autoencoder>>;
}
