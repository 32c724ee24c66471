//! [`mirrored_edges`]: control images for the demo's ControlNet, computed as `assets/mini-flux/dataset.py` did for its
//! training.

use clearform_runtime::RgbImage;
use image::Rgb;

/// Weights of red, green and blue in luminance (ITU-R BT.601).
const LUMA: [f64; 3] = [0.299, 0.587, 0.114];

/// White edges on black of the mirrored image, which the model does not generate without the ControlNet.
pub fn mirrored_edges(image: &RgbImage) -> RgbImage {
    let mirrored = image::imageops::flip_horizontal(image);
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let white = ((gradient(&mirrored, x, y) - 0.25).clamp(0.0, 0.5) * 2.0 * 255.0).round() as u8;
        Rgb([white; 3])
    })
}

/// Magnitude of the luminance gradient (Sobel), luminance from -1 to 1, with replicated borders.
fn gradient(image: &RgbImage, x: u32, y: u32) -> f64 {
    let luma = |dx: i64, dy: i64| {
        let clamped = |at: u32, step: i64, size: u32| (i64::from(at) + step).clamp(0, i64::from(size) - 1) as u32;
        let Rgb(pixel) = image.get_pixel(clamped(x, dx, image.width()), clamped(y, dy, image.height()));
        pixel.iter().zip(LUMA).map(|(value, weight)| f64::from(*value) * weight / 127.5).sum::<f64>()
    };
    let difference = |a: [f64; 3], b: [f64; 3]| a[0] - b[0] + 2.0 * (a[1] - b[1]) + a[2] - b[2];
    let across = difference([-1, 0, 1].map(|d| luma(-1, d)), [-1, 0, 1].map(|d| luma(1, d)));
    let down = difference([-1, 0, 1].map(|d| luma(d, -1)), [-1, 0, 1].map(|d| luma(d, 1)));
    across.hypot(down)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_mirrored() {
        let image = RgbImage::from_fn(8, 4, |x, _| Rgb([if x < 2 { 0 } else { 255 }; 3]));
        let edges = mirrored_edges(&image);
        let row: Vec<u8> = (0..8).map(|x| edges.get_pixel(x, 1).0[0]).collect();
        assert_eq!(row, [0, 0, 0, 0, 0, 255, 255, 0]);
    }
}
