//! [`LatentSpec`]: what a model denoises, latents of a VAE or pixels: their channels, and the image sizes it can generate.
//! It loads no weights.

use crate::components::VAE;
use crate::{Components, Result, RuntimeError, TransformerCheckpoint};
use clearform_models::ImageSize;
use clearform_models::vae::{AutoencoderSpec, autoencoder};

/// Most pixels along an edge: far more than any model generates, and few enough that no product of sizes overflows.
const LARGEST: usize = 1 << 15;
/// Latent pixels along the edge of an image if neither transformer nor VAE states it: diffusers' `default_sample_size`, which
/// is 1024 pixels with the usual VAE.
const DEFAULT_EDGE: usize = 128;

/// What a model denoises.
pub(crate) struct LatentSpec {
    vae: Option<Box<dyn AutoencoderSpec>>,
    channels: usize,
    patch_size: usize,
    native_size: ImageSize,
    takes_control: bool,
}

impl LatentSpec {
    /// Reads the configs of `components`, and checks that the VAE fits the transformer.
    pub fn new(components: &Components, transformer: &TransformerCheckpoint) -> Result<Self> {
        let spec = transformer.pipeline_spec();
        let has_vae = transformer.identified().components().iter().any(|component| component == "vae");
        let vae = || autoencoder(&components.config(VAE)?).map_err(|error| components.located(VAE, error));
        let vae = has_vae.then(vae).transpose()?;
        let in_channels = transformer.architecture().input_channels().latents;
        let (channels, downscale) =
            vae.as_ref().map_or((in_channels, 1), |vae| (vae.latent_channels(), vae.downscale()));
        let patch_size = spec.patch_size();
        let edge = spec.sample_size().map(|edge| edge * downscale);
        let vae_edge = || vae.as_ref().and_then(|vae| vae.sample_size());
        let edge = edge.or_else(vae_edge).unwrap_or(DEFAULT_EDGE * downscale);
        let takes_control = has_control_channels(in_channels, channels)?;
        Ok(Self { vae, channels, patch_size, native_size: ImageSize { height: edge, width: edge }, takes_control })
    }

    /// The VAE's config; `None` if the model generates pixels.
    pub fn vae(&self) -> Option<&dyn AutoencoderSpec> {
        self.vae.as_deref()
    }

    /// Channels of the latents of an image, or of its pixels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The image size that the model was trained on.
    pub fn native_size(&self) -> ImageSize {
        self.native_size
    }

    /// Whether the transformer takes the latents of a control image beside its own.
    pub fn takes_control(&self) -> bool {
        self.takes_control
    }

    /// Channels, height and width of the latents of an image.
    pub fn latent_shape(&self, size: ImageSize) -> Result<[usize; 3]> {
        let ImageSize { height, width } = self.check_size(size)?;
        Ok([self.channels, height / self.downscale(), width / self.downscale()])
    }

    /// Number of tokens of an image.
    pub fn image_tokens(&self, size: ImageSize) -> Result<usize> {
        let [_, height, width] = self.latent_shape(size)?;
        Ok((height / self.patch_size) * (width / self.patch_size))
    }

    /// `size`, if it is a whole number of tokens in both directions.
    pub fn check_size(&self, size: ImageSize) -> Result<ImageSize> {
        let multiple = self.patch_size * self.downscale();
        let fits = |edge: usize| (1..=LARGEST).contains(&edge) && edge.is_multiple_of(multiple);
        if fits(size.height) && fits(size.width) {
            return Ok(size);
        }
        let nearest = |edge: usize| edge.clamp(multiple, LARGEST / multiple * multiple).next_multiple_of(multiple);
        let ImageSize { height, width } = size;
        Err(RuntimeError::BadSetting(format!(
            "size: expected multiples of {multiple} up to {LARGEST}, found width {width} and height {height}; the nearest are {} and {}",
            nearest(width),
            nearest(height)
        )))
    }

    fn downscale(&self) -> usize {
        self.vae.as_ref().map_or(1, |vae| vae.downscale())
    }
}

/// Whether a transformer with `in_channels` takes a control image, where the VAE's latents have `channels`. FLUX.1's Canny
/// and Depth models, and their LoRAs, take twice the channels; inpainting models (Fill) take other numbers.
fn has_control_channels(in_channels: usize, channels: usize) -> Result<bool> {
    if in_channels == channels || in_channels == 2 * channels {
        return Ok(in_channels == 2 * channels);
    }
    Err(RuntimeError::BadSetting(format!(
        "the transformer takes {in_channels} latent channels, but the latents of this VAE have {channels}. Either the VAE belongs to \
         another model (pass the right one with --components DIR), or the transformer also takes a mask (inpainting), \
         which is not supported"
    )))
}
