//! Masks of ControlNets for inpainting, as diffusers' `StableDiffusion3ControlNetInpaintingPipeline` prepares them:
//! what is painted anew is covered in the control image, and what is kept is a further channel of its latents.

use crate::Result;
use crate::images::resized;
use candle_core::{Device, Tensor};
use clearform_models::ImageSize;
use image::{Rgb, RgbImage};

/// Brightness from which on a pixel is painted anew: half of white.
const WHITE: u32 = 128;

/// 1 where `mask` is white and the image is painted anew, 0 where it is kept.
///
/// # Shapes
/// The result is (1, 1, height, width), f32.
pub(crate) fn mask_values(mask: &RgbImage, size: ImageSize) -> Result<Tensor> {
    let values: Vec<f32> =
        resized(mask, size).pixels().map(|pixel| f32::from(u8::from(brightness(*pixel) >= WHITE))).collect();
    Ok(Tensor::from_vec(values, (1, 1, size.height, size.width), &Device::Cpu)?)
}

/// The brightness of a pixel, from 0 to 255, as Pillow computes it in fixed-point numbers (ITU-R 601).
fn brightness(Rgb([red, green, blue]): Rgb<u8>) -> u32 {
    (u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + (1 << 15)) >> 16
}

/// `pixels` with -1, the VAE's black, where they are painted anew.
///
/// # Shapes
/// pixels (images, 3, height, width), mask (1, 1, height, width) -> as pixels.
pub(crate) fn covered(pixels: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let kept = mask.affine(-1.0, 1.0)?;
    Ok(pixels.broadcast_mul(&kept)?.broadcast_sub(mask)?)
}

/// `latents` with a channel that is 1 where the image is kept: the mask at the first pixel of each latent one.
///
/// # Shapes
/// latents (images, channels, height, width), mask (1, 1, height · factor, width · factor) -> (images, channels + 1,
/// height, width).
pub(crate) fn with_kept(latents: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (images, _, height, width) = latents.dims4()?;
    let mut kept = mask.affine(-1.0, 1.0)?;
    for (axis, count) in [(2, height), (3, width)] {
        let factor = kept.dim(axis)? / count;
        let places: Vec<u32> = (0..count).map(|place| (place * factor) as u32).collect();
        kept = kept.index_select(&Tensor::new(places, &Device::Cpu)?, axis)?;
    }
    let kept = kept.repeat((images, 1, 1, 1))?.to_device(latents.device())?;
    Ok(Tensor::cat(&[latents, &kept.to_dtype(latents.dtype())?], 1)?)
}
