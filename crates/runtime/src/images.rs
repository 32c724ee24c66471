//! From the VAE's output to 8-bit RGB images, and the check that they are not empty.

use crate::{Result, RuntimeError};
use candle_core::{DType, Tensor};
use clearform_models::ImageSize;
use image::RgbImage;

/// Converts the VAE's output to images as diffusers' `VaeImageProcessor` does: x / 2 + 0.5, clamped to 0..1, times 255,
/// rounded half to even.
///
/// # Shapes
/// decoded (batch, 3, height, width), or (batch, 1, height, width) for greyscale images.
///
/// # Errors
/// [`RuntimeError::BadImage`] for NaN and infinity.
pub fn to_images(decoded: &Tensor) -> Result<Vec<RgbImage>> {
    let (batch, channels, height, width) = decoded.dims4()?;
    let decoded = match channels {
        3 => decoded.clone(),
        1 => decoded.repeat((1, 3, 1, 1))?,
        _ => return Err(RuntimeError::BadImage(format!("expected 1 or 3 channels, found {channels}"))),
    };
    let pixels = decoded.to_dtype(DType::F32)?.permute((0, 2, 3, 1))?.flatten_from(1)?; // (batch, height width 3)
    (0..batch).map(|index| to_image(&pixels.get(index)?.to_vec1()?, ImageSize { height, width }, index)).collect()
}

/// Refuses images of a single colour, which only broken weights generate.
///
/// # Errors
/// [`RuntimeError::BadImage`] names the first such image.
pub fn check_images(images: &[RgbImage]) -> Result<()> {
    match images.iter().position(is_flat) {
        Some(index) => Err(RuntimeError::BadImage(format!(
            "number {} is a single colour, so nothing was saved. Likely cause: wrong or damaged weights of the \
             transformer or the VAE; `clearform verify` checks them",
            index + 1
        ))),
        None => Ok(()),
    }
}

fn to_image(values: &[f32], size: ImageSize, index: usize) -> Result<RgbImage> {
    if values.iter().any(|value| !value.is_finite()) {
        return Err(RuntimeError::BadImage(format!(
            "number {} contains NaN or infinity, so nothing was saved. Likely causes: damaged weights, or a dtype whose \
             range is too small for this model; try --dtype f32, on a CPU",
            index + 1
        )));
    }
    let bytes = values.iter().map(|value| to_byte(*value)).collect();
    RgbImage::from_raw(size.width as u32, size.height as u32, bytes)
        .ok_or_else(|| RuntimeError::BadImage(format!("expected height x width x 3 values, found {}", values.len())))
}

fn to_byte(value: f32) -> u8 {
    ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}

fn is_flat(image: &RgbImage) -> bool {
    let mut pixels = image.pixels();
    let first = pixels.next();
    pixels.all(|pixel| Some(pixel) == first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// numpy: ((x * 0.5 + 0.5).clip(0, 1) * 255).round().astype("uint8")
    #[test]
    fn bytes_are_those_of_diffusers() {
        let cases = [(-7.0, 0), (-1.0, 0), (0.0, 128), (0.5, 191), (1.0, 255), (3.0, 255), (-0.995, 1), (-0.998, 0)];
        for (value, byte) in cases {
            assert_eq!(to_byte(value), byte, "{value}");
        }
    }

    #[test]
    fn channels_become_the_innermost() {
        let values = Tensor::arange(0_f32, 12.0, &Device::Cpu).unwrap().affine(0.125, -1.0).unwrap();
        let image = to_images(&values.reshape((1, 3, 2, 2)).unwrap()).unwrap().remove(0);
        assert_eq!(image.get_pixel(1, 0).0, [16, 80, 143]);
        assert_eq!(image.get_pixel(0, 1).0, [32, 96, 159]);
    }

    #[test]
    fn greyscale_has_equal_channels() {
        let values = Tensor::new(&[-1_f32, 0.0, 0.5, 1.0, 1.0, -1.0], &Device::Cpu).unwrap();
        let images = to_images(&values.reshape((2, 1, 1, 3)).unwrap()).unwrap();
        let bytes: Vec<&[u8]> = images.iter().map(|image| image.as_raw().as_slice()).collect();
        assert_eq!(bytes, [[0, 0, 0, 128, 128, 128, 191, 191, 191], [255, 255, 255, 255, 255, 255, 0, 0, 0]]);
        assert!(to_images(&values.reshape((1, 2, 1, 3)).unwrap()).unwrap_err().to_string().contains("found 2"));
    }

    #[test]
    fn broken_images_are_refused() {
        let nan = Tensor::new(&[f32::NAN; 12], &Device::Cpu).unwrap().reshape((1, 3, 2, 2)).unwrap();
        assert!(to_images(&nan).unwrap_err().to_string().contains("number 1 contains NaN or infinity"));
        let mut good = RgbImage::from_pixel(4, 4, image::Rgb([9, 9, 9]));
        let flat = good.clone();
        good.put_pixel(3, 3, image::Rgb([9, 9, 8]));
        assert!(check_images(std::slice::from_ref(&good)).is_ok());
        assert!(check_images(&[good, flat]).unwrap_err().to_string().contains("number 2 is a single colour"));
    }
}
