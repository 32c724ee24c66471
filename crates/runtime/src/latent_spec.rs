//! [`LatentSpec`]: what a model draws on: latents of a VAE, or pixels; their channels, and the sizes that can be drawn. It loads
//! no weights.

use crate::control_concat::channel_axis;
use crate::{Components, Result, RuntimeError, Transformer};
use candle_core::{DType, Device, Tensor};
use clearform_models::ImageSize;
use clearform_models::vae::VaeConfig;
use serde_json::Value;

/// More pixels along an edge than anyone can have meant.
const LARGEST: usize = 1 << 15;
/// Latent places along the edge of a picture where nothing tells: 1024 pixels for most.
const USUAL_EDGE: usize = 128;

/// What a model draws on.
pub(crate) struct LatentSpec {
    vae: Option<VaeConfig>,
    channels: usize,
    patch: usize,
    own_size: ImageSize,
    takes_control: bool,
}

impl LatentSpec {
    /// Reads the small files of `components`, and holds the VAE against the transformer.
    pub fn new(components: &Components, transformer: &Transformer) -> Result<Self> {
        let (family, config) = (transformer.family(), transformer.config());
        let has_vae = transformer.identified().components().iter().any(|part| part == "vae");
        let vae_config = if has_vae { components.config("vae")? } else { Value::Null };
        let vae = if has_vae { Some(VaeConfig::new(&vae_config)?) } else { None };
        let takes = config["in_channels"].as_u64().unwrap_or(0) as usize;
        let (channels, downscale) = vae.as_ref().map_or((takes, 1), |vae| (vae.latent_channels, vae.downscale()));
        let patch = family.patch(config)?;
        let edge = family.sample_size(config)?.map(|edge| edge * downscale);
        let of_vae = || vae_config["sample_size"].as_u64().map(|edge| edge as usize);
        let edge = edge.or_else(of_vae).unwrap_or(USUAL_EDGE * downscale);
        let takes_control = Self::takes_control_in(takes, packed_channels(transformer, channels, patch)?)?;
        Ok(Self { vae, channels, patch, own_size: ImageSize { height: edge, width: edge }, takes_control })
    }

    /// The VAE's sizes; none where the model draws pixels.
    pub fn vae(&self) -> Option<&VaeConfig> {
        self.vae.as_ref()
    }

    /// Extents of the pictures that the model knows.
    pub fn native_size(&self) -> ImageSize {
        self.own_size
    }

    /// Whether the transformer takes a control's latents beside its own.
    pub fn takes_control(&self) -> bool {
        self.takes_control
    }

    /// Channels, height and width of the latents of a picture.
    pub fn latent_shape(&self, size: ImageSize) -> Result<[usize; 3]> {
        let ImageSize { height, width } = self.check_size(size)?;
        Ok([self.channels, height / self.downscale(), width / self.downscale()])
    }

    /// Image tokens of a picture.
    pub fn image_tokens(&self, size: ImageSize) -> Result<usize> {
        let [_, height, width] = self.latent_shape(size)?;
        Ok((height / self.patch) * (width / self.patch))
    }

    /// Whole tokens across and down are needed.
    pub fn check_size(&self, size: ImageSize) -> Result<ImageSize> {
        let multiple = self.patch * self.downscale();
        let fits = |extent: usize| (1..=LARGEST).contains(&extent) && extent.is_multiple_of(multiple);
        if fits(size.height) && fits(size.width) {
            return Ok(size);
        }
        let near = |extent: usize| extent.clamp(multiple, LARGEST / multiple * multiple).next_multiple_of(multiple);
        let ImageSize { height, width } = size;
        Err(RuntimeError::BadSetting(format!(
            "size: expected multiples of {multiple} up to {LARGEST}, found width {width} and height {height}; try --width {} --height {}",
            near(width),
            near(height)
        )))
    }

    fn downscale(&self) -> usize {
        self.vae.as_ref().map_or(1, VaeConfig::downscale)
    }

    /// Canny and depth models, also those that a LoRA makes, take as many channels of a control beside their own; models
    /// that take masks are not run here.
    fn takes_control_in(takes: usize, packed: usize) -> Result<bool> {
        if takes == packed || takes == 2 * packed {
            return Ok(takes == 2 * packed);
        }
        Err(RuntimeError::BadSetting(format!(
            "the transformer takes {takes} channels, but this VAE's latents have {packed} as it takes them. Either the VAE \
             is another model's (give the right one with --components DIR), or the transformer draws from a mask too \
             (fill), which is not supported"
        )))
    }
}

/// Channels of latents as the transformer takes them.
fn packed_channels(transformer: &Transformer, channels: usize, patch: usize) -> Result<usize> {
    let latents = Tensor::zeros((1, channels, patch, patch), DType::F32, &Device::Cpu)?;
    let (packed, _) = transformer.family().pack(&latents)?;
    Ok(packed.dim(channel_axis(&packed))?)
}
