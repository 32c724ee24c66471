//! From the VAE's output to 8-bit RGB images, and the check that they are not empty.

use crate::{Result, RuntimeError};
use candle_core::{DType, Tensor};
use clearform_models::ImageSize;
use image::RgbImage;
use image::imageops::{FilterType, resize};

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

/// `image` in another size. Lanczos is the filter of diffusers' `VaeImageProcessor`.
pub(crate) fn resized(image: &RgbImage, size: ImageSize) -> RgbImage {
    let (width, height) = (size.width as u32, size.height as u32);
    match image.dimensions() == (width, height) {
        true => image.clone(),
        false => resize(image, width, height, FilterType::Lanczos3),
    }
}

/// Images scaled to cover `size` and cut to it from the middle, as diffusers' `resize_and_crop_tensor`: bilinear, with
/// corners not aligned and without smoothing.
///
/// # Shapes
/// (batch, channels, height, width) in f32 -> (batch, channels, size.height, size.width).
pub(crate) fn resize_and_crop(images: &Tensor, size: ImageSize) -> Result<Tensor> {
    let (_, _, height, width) = images.dims4()?;
    if (ImageSize { height, width }) == size {
        return Ok(images.clone());
    }
    let ratio = (size.height as f64 / height as f64).max(size.width as f64 / width as f64);
    let covering = |edge: usize, wanted: usize| ((edge as f64 * ratio) as usize).max(wanted);
    let (tall, wide) = (covering(height, size.height), covering(width, size.width));
    let resized = interpolate(&interpolate(images, 2, tall)?, 3, wide)?;
    let rows = resized.narrow(2, (tall - size.height) / 2, size.height)?;
    Ok(rows.narrow(3, (wide - size.width) / 2, size.width)?.contiguous()?)
}

/// Linear interpolation along `axis` to `count` values.
fn interpolate(images: &Tensor, axis: usize, count: usize) -> Result<Tensor> {
    let stored = images.dim(axis)?;
    if stored == count {
        return Ok(images.clone());
    }
    let scale = stored as f32 / count as f32;
    let place = |at: usize| (scale * (at as f32 + 0.5) - 0.5).max(0.0);
    let lower: Vec<u32> = (0..count).map(|at| (place(at) as u32).min(stored as u32 - 1)).collect();
    let upper: Vec<u32> = lower.iter().map(|at| (at + 1).min(stored as u32 - 1)).collect();
    let weights: Vec<f32> = lower.iter().enumerate().map(|(at, lower)| place(at) - *lower as f32).collect();
    let mut shape = vec![1; images.rank()];
    shape[axis] = count;
    let device = images.device();
    let values = |indices: Vec<u32>| images.index_select(&Tensor::new(indices, device)?, axis);
    let weights = Tensor::from_vec(weights, shape, device)?;
    let (lower, upper) = (values(lower)?, values(upper)?);
    Ok((&lower + (upper - &lower)?.broadcast_mul(&weights)?)?)
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
            "number {} contains NaN or infinity, so nothing was saved. Likely causes: damaged weights, an adapter \
             that is too strong, or a dtype whose range is too small for this model (f32, on a CPU, has the largest)",
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

    /// torch: PixArtImageProcessor.resize_and_crop_tensor(torch.arange(24.).reshape(1, 1, 4, 6), width, height)
    #[test]
    fn images_are_resized_as_diffusers_does() {
        let image = Tensor::arange(0_f32, 24.0, &Device::Cpu).unwrap().reshape((1, 1, 4, 6)).unwrap();
        let resized = |height, width| {
            let resized = resize_and_crop(&image, ImageSize { height, width }).unwrap();
            resized.squeeze(0).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap()
        };
        let cases: [(usize, usize, &[[f32; 3]]); 3] = [
            (3, 3, &[[1.25, 2.75, 4.25], [9.25, 10.75, 12.25], [17.25, 18.75, 20.25]]),
            (2, 6, &[[6.0, 7.0, 8.0], [12.0, 13.0, 14.0]]),
            (7, 4, &[[1.6, 2.2, 2.8], [3.742_857_5, 4.342_857_4, 4.942_857_7], [7.171_429, 7.771_428_6, 8.371_428]]),
        ];
        for (height, width, expected) in cases {
            let found = resized(height, width);
            assert_eq!((found.len(), found[0].len()), (height, width));
            for (found, expected) in found.iter().zip(expected) {
                let nearest = |(found, expected): (&f32, &f32)| (found - expected).abs() < 1e-5;
                assert!(found.iter().zip(expected).all(nearest), "{found:?} {expected:?}");
            }
        }
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
