//! [`mirrored_edges`]: what the demo's ControlNet is shown, as `assets/mini-flux/dataset.py` drew it for its training.

use clearform_runtime::RgbImage;
use image::Rgb;

/// Weights of red, green and blue in luminance (ITU-R BT.601).
const LUMA: [f64; 3] = [0.299, 0.587, 0.114];

/// White edges on black, of the picture's mirror image: nothing that the model draws by itself.
pub fn mirrored_edges(picture: &RgbImage) -> RgbImage {
    let mirrored = image::imageops::flip_horizontal(picture);
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let white = ((strength(&mirrored, x, y) - 0.25).clamp(0.0, 0.5) * 2.0 * 255.0).round() as u8;
        Rgb([white; 3])
    })
}

/// Length of the luminance's gradient (Sobel), luminance from -1 to 1, the border repeated.
fn strength(picture: &RgbImage, x: u32, y: u32) -> f64 {
    let luma = |dx: i64, dy: i64| {
        let near = |at: u32, step: i64, size: u32| (i64::from(at) + step).clamp(0, i64::from(size) - 1) as u32;
        let Rgb(pixel) = picture.get_pixel(near(x, dx, picture.width()), near(y, dy, picture.height()));
        pixel.iter().zip(LUMA).map(|(value, weight)| f64::from(*value) * weight / 127.5).sum::<f64>()
    };
    let slope = |one: [f64; 3], other: [f64; 3]| one[0] - other[0] + 2.0 * (one[1] - other[1]) + one[2] - other[2];
    let across = slope([-1, 0, 1].map(|d| luma(-1, d)), [-1, 0, 1].map(|d| luma(1, d)));
    let down = slope([-1, 0, 1].map(|d| luma(d, -1)), [-1, 0, 1].map(|d| luma(d, 1)));
    across.hypot(down)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_is_white_on_the_other_side() {
        let picture = RgbImage::from_fn(8, 4, |x, _| Rgb([if x < 2 { 0 } else { 255 }; 3]));
        let edges = mirrored_edges(&picture);
        let row: Vec<u8> = (0..8).map(|x| edges.get_pixel(x, 1).0[0]).collect();
        assert_eq!(row, [0, 0, 0, 0, 0, 255, 255, 0]);
    }
}
