//! [`nearest_bin`]: the sizes in which PixArt was trained, one for each aspect ratio.

use crate::ImageSize;

/// (aspect ratio as diffusers' tables have it, height, width), of an image whose square is 16 x 16; by ratio. They are
/// diffusers' `ASPECT_RATIO_256_BIN` to `ASPECT_RATIO_1024_BIN`.
const BINS: [(f64, usize, usize); 33] = [
    (0.25, 8, 32),
    (0.28, 8, 29),
    (0.32, 9, 28),
    (0.33, 9, 27),
    (0.35, 9, 26),
    (0.4, 10, 25),
    (0.42, 10, 24),
    (0.48, 11, 23),
    (0.5, 11, 22),
    (0.52, 11, 21),
    (0.57, 12, 21),
    (0.6, 12, 20),
    (0.68, 13, 19),
    (0.72, 13, 18),
    (0.78, 14, 18),
    (0.82, 14, 17),
    (0.88, 15, 17),
    (0.94, 15, 16),
    (1.0, 16, 16),
    (1.07, 16, 15),
    (1.13, 17, 15),
    (1.21, 17, 14),
    (1.29, 18, 14),
    (1.38, 18, 13),
    (1.46, 19, 13),
    (1.67, 20, 12),
    (1.75, 21, 12),
    (2.0, 22, 11),
    (2.09, 23, 11),
    (2.4, 24, 10),
    (2.5, 25, 10),
    (3.0, 27, 9),
    (4.0, 32, 8),
];
/// What `ASPECT_RATIO_2048_BIN` has beside them.
const LARGE_BINS: [(f64, usize, usize); 7] =
    [(0.26, 8, 31), (0.27, 8, 30), (2.89, 26, 9), (3.11, 28, 9), (3.62, 29, 8), (3.75, 30, 8), (3.88, 31, 8)];
/// Sides of the latents of models that have bins.
const SAMPLE_SIZES: [usize; 4] = [32, 64, 128, LARGE];
const LARGE: usize = 256;

/// The size of training nearest in aspect ratio to `size`, for a model trained on latents of `sample_size`. Models of
/// other sizes have no bins: `size` itself.
pub(super) fn nearest_bin(size: ImageSize, sample_size: usize) -> ImageSize {
    let ratio = size.height as f64 / size.width as f64;
    let more = if sample_size == LARGE { &LARGE_BINS[..] } else { &[] };
    let distance = |bin: &(f64, usize, usize)| (bin.0 - ratio).abs();
    // Of two equally near ones, the lower ratio stands first in diffusers' tables.
    let order = |a: &&(f64, usize, usize), b: &&(f64, usize, usize)| {
        distance(a).total_cmp(&distance(b)).then(a.0.total_cmp(&b.0))
    };
    let unit = sample_size / 2;
    match BINS.iter().chain(more).min_by(order) {
        Some((_, height, width)) if SAMPLE_SIZES.contains(&sample_size) => {
            ImageSize { height: height * unit, width: width * unit }
        }
        _ => size,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// tests/fixtures/pixart/captions.py wrote them.
    #[test]
    fn bins_are_those_of_diffusers() {
        let text = include_str!("../../../../../tests/fixtures/pixart/sizes.json");
        let rows: Vec<[usize; 5]> = serde_json::from_str(text).unwrap();
        assert!(rows.len() > 60);
        for [sample_size, height, width, binned_height, binned_width] in rows {
            let expected = ImageSize { height: binned_height, width: binned_width };
            assert_eq!(
                nearest_bin(ImageSize { height, width }, sample_size),
                expected,
                "{sample_size} {height} {width}"
            );
        }
        let odd = ImageSize { height: 40, width: 24 };
        assert_eq!(nearest_bin(odd, 8), odd);
    }
}
