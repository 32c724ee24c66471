//! How similar images are (PSNR, SSIM, retrieval), and contact sheets that show them side by side.

use crate::{Result, RuntimeError};
use image::{Rgb, RgbImage};

/// Peak signal-to-noise ratio over all channels, in dB: 10 log10(255² / mean squared error). Infinite for equal
/// images.
///
/// # Errors
/// [`RuntimeError::BadImage`] for images of different sizes.
pub fn psnr(first: &RgbImage, second: &RgbImage) -> Result<f64> {
    same_size(first, second)?;
    let squares = first.iter().zip(second.iter()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    let mean = squares.sum::<f64>() / first.len() as f64;
    Ok(10.0 * (255.0 * 255.0 / mean).log10())
}

/// The PSNR of all images together, in dB: that of the mean of their mean squared errors.
///
/// # Errors
/// [`RuntimeError::BadImage`] for images of different sizes.
pub fn psnr_of_all(first: &[RgbImage], second: &[RgbImage]) -> Result<f64> {
    let each = first.iter().zip(second).map(|(first, second)| psnr(first, second)).collect::<Result<Vec<_>>>()?;
    let squared_error = |psnr: &f64| 10f64.powf(-psnr / 10.0);
    Ok(-10.0 * (each.iter().map(squared_error).sum::<f64>() / each.len() as f64).log10())
}

/// Structural similarity (Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 13(4), 2004) of the luma (ITU-R BT.601): mean
/// over all positions of an 11 x 11 Gaussian window with sigma 1.5 that lie within the image, K1 = 0.01, K2 = 0.03,
/// range 255.
///
/// # Errors
/// [`RuntimeError::BadImage`] for images of different sizes, or smaller than the window.
pub fn ssim(first: &RgbImage, second: &RgbImage) -> Result<f64> {
    same_size(first, second)?;
    if (first.width().min(first.height()) as usize) < WINDOW {
        return Err(RuntimeError::BadImage(format!("SSIM needs at least {WINDOW} x {WINDOW} pixels")));
    }
    let a = ImageChannel::luma(first);
    let b = ImageChannel::luma(second);
    let mean_a = a.blurred();
    let mean_b = b.blurred();
    let mean_aa = a.times(&a).blurred();
    let mean_bb = b.times(&b).blurred();
    let mean_ab = a.times(&b).blurred();
    let similarity = |i: usize| {
        let x = mean_a.values[i];
        let y = mean_b.values[i];
        let variance_x = mean_aa.values[i] - x * x;
        let variance_y = mean_bb.values[i] - y * y;
        let covariance = mean_ab.values[i] - x * y;
        ((2.0 * x * y + C1) * (2.0 * covariance + C2)) / ((x * x + y * y + C1) * (variance_x + variance_y + C2))
    };
    let count = mean_a.values.len();
    Ok((0..count).map(similarity).sum::<f64>() / count as f64)
}

/// For each image the index of the most similar reference: least mean squared error after 4 x 4 average pooling.
///
/// # Errors
/// [`RuntimeError::BadImage`] for images of different sizes, or without a reference.
pub fn retrieve(images: &[RgbImage], references: &[RgbImage]) -> Result<Vec<usize>> {
    let first = references.first().ok_or_else(|| RuntimeError::BadImage("retrieval needs a reference".to_owned()))?;
    images.iter().chain(references).try_for_each(|image| same_size(first, image))?;
    let pooled = references.iter().map(pool).collect::<Vec<_>>();
    Ok(images.iter().map(|image| nearest(&pool(image), &pooled)).collect())
}

/// Rows of images on white, with a gap around each. The cells of a row are as large as its largest image.
pub fn contact_sheet(rows: &[Vec<&RgbImage>]) -> RgbImage {
    let sizes = rows.iter().map(|row| row_size(row)).collect::<Vec<_>>();
    let width = sizes.iter().map(|size| size.0).max().unwrap_or(0);
    let height = sizes.iter().map(|size| size.1).sum::<u32>();
    let mut sheet = RgbImage::from_pixel(width + GAP, height + GAP, Rgb([255; 3]));
    let mut top = GAP;
    for (row, size) in rows.iter().zip(&sizes) {
        let cell = cell_width(row) + GAP;
        for (column, image) in row.iter().enumerate() {
            let left = i64::from(GAP + column as u32 * cell);
            image::imageops::replace(&mut sheet, *image, left, i64::from(top));
        }
        top += size.1;
    }
    sheet
}

// As in the SSIM paper.
const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;
const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);
/// Pixels between the images of a sheet.
const GAP: u32 = 4;
/// Edge of the cells that retrieval averages, so that it compares what an image shows and not its fine noise.
const CELL: u32 = 4;

/// One channel in f64.
struct ImageChannel {
    values: Vec<f64>,
    width: usize,
}

impl ImageChannel {
    fn luma(image: &RgbImage) -> Self {
        let luma = |pixel: &Rgb<u8>| {
            let [red, green, blue] = pixel.0.map(f64::from);
            0.299 * red + 0.587 * green + 0.114 * blue
        };
        Self { values: image.pixels().map(luma).collect(), width: image.width() as usize }
    }

    fn times(&self, other: &Self) -> Self {
        let values = self.values.iter().zip(&other.values).map(|(a, b)| a * b).collect();
        Self { values, width: self.width }
    }

    /// Means under the Gaussian window at every position within the image. The window is separable: along rows first, then
    /// along columns.
    fn blurred(&self) -> Self {
        self.blurred_rows().transposed().blurred_rows().transposed()
    }

    fn blurred_rows(&self) -> Self {
        let weights = gaussian();
        let mean = |window: &[f64]| window.iter().zip(&weights).map(|(value, weight)| value * weight).sum::<f64>();
        let values = self.values.chunks_exact(self.width).flat_map(|row| row.windows(WINDOW).map(mean)).collect();
        Self { values, width: self.width + 1 - WINDOW }
    }

    fn transposed(&self) -> Self {
        let height = self.values.len() / self.width;
        let column = |x: usize| self.values.iter().copied().skip(x).step_by(self.width);
        Self { values: (0..self.width).flat_map(column).collect(), width: height }
    }
}

fn gaussian() -> [f64; WINDOW] {
    let raw = std::array::from_fn(|index| {
        let distance = index as f64 - (WINDOW / 2) as f64;
        (-distance * distance / (2.0 * SIGMA * SIGMA)).exp()
    });
    let sum = raw.iter().sum::<f64>();
    raw.map(|weight: f64| weight / sum)
}

/// Means of whole cells, row by row, channel after channel.
fn pool(image: &RgbImage) -> Vec<f64> {
    let columns = image.width() / CELL;
    let rows = image.height() / CELL;
    let cells = (0..rows).flat_map(|row| (0..columns).map(move |column| (column, row)));
    cells.flat_map(|(column, row)| cell_mean(image, column * CELL, row * CELL)).collect()
}

fn cell_mean(image: &RgbImage, left: u32, top: u32) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for (x, y) in (0..CELL * CELL).map(|index| (left + index % CELL, top + index / CELL)) {
        let pixel = image.get_pixel(x, y).0;
        sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += f64::from(value));
    }
    sums.map(|sum| sum / f64::from(CELL * CELL))
}

fn nearest(image: &[f64], references: &[Vec<f64>]) -> usize {
    let error = |reference: &[f64]| image.iter().zip(reference).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    let errors = references.iter().map(|reference| error(reference)).enumerate();
    errors.min_by(|(_, a), (_, b)| a.total_cmp(b)).map_or(0, |(index, _)| index)
}

fn cell_width(row: &[&RgbImage]) -> u32 {
    row.iter().map(|image| image.width()).max().unwrap_or(0)
}

/// Width and height of a row, with one gap in each cell.
fn row_size(row: &[&RgbImage]) -> (u32, u32) {
    let height = row.iter().map(|image| image.height()).max().unwrap_or(0);
    (row.len() as u32 * (cell_width(row) + GAP), height + GAP)
}

fn same_size(first: &RgbImage, second: &RgbImage) -> Result<()> {
    let (width, height) = first.dimensions();
    let (other_width, other_height) = second.dimensions();
    if (width, height) == (other_width, other_height) {
        return Ok(());
    }
    let reason = format!("{width} x {height} and {other_width} x {other_height} pixels cannot be compared");
    Err(RuntimeError::BadImage(reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that numpy computes the same way: (x * a + y * b + channel * c) % 256.
    fn pattern([a, b, c]: [u32; 3], width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            Rgb([0, 1, 2].map(|channel| ((x * a + y * b + channel * c) % 256) as u8))
        })
    }

    fn assert_near(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-9, "{got} instead of {want}");
    }

    #[test]
    fn psnr_by_hand() {
        let dark = RgbImage::from_pixel(4, 4, Rgb([0; 3]));
        let light = RgbImage::from_pixel(4, 4, Rgb([10; 3]));
        assert_near(psnr(&dark, &light).unwrap(), 28.130_803_608_679_106);
        assert_eq!(psnr(&dark, &dark).unwrap(), f64::INFINITY);
        assert!(psnr(&dark, &RgbImage::new(4, 5)).is_err());
    }

    /// Of two constants c and d only the luminance term is left: (2cd + C1) / (c² + d² + C1).
    #[test]
    fn ssim_of_constants_by_hand() {
        let first = RgbImage::from_pixel(11, 12, Rgb([100; 3]));
        let second = RgbImage::from_pixel(11, 12, Rgb([50; 3]));
        assert_near(ssim(&first, &second).unwrap(), (10_000.0 + C1) / (12_500.0 + C1));
        assert_near(ssim(&first, &first).unwrap(), 1.0);
        assert!(ssim(&RgbImage::new(10, 11), &RgbImage::new(10, 11)).is_err());
    }

    /// From fixtures/ssim.py, which sums over every window as the paper writes it.
    #[test]
    fn ssim_of_patterns_is_that_of_numpy() {
        let cases =
            [([7, 3, 50], [6, 3, 70], SSIM[0]), ([2, 5, 11], [5, 2, 90], SSIM[1]), ([1, 1, 0], [1, 2, 0], SSIM[2])];
        for (first, second, want) in cases {
            assert_near(ssim(&pattern(first, 19, 14), &pattern(second, 19, 14)).unwrap(), want);
        }
    }

    const SSIM: [f64; 3] = [0.9667663292667869, 0.4235111561445183, 0.9111506182722091];

    #[test]
    fn the_nearest_is_found_through_fine_noise() {
        let references = [[3, 1, 40], [1, 9, 7], [5, 5, 5]].map(|seed| pattern(seed, 16, 16));
        let mut images = [references[2].clone(), references[0].clone()];
        for (x, y, pixel) in images.iter_mut().flat_map(|image| image.enumerate_pixels_mut()) {
            let change = if (x + y) % 2 == 0 { 20 } else { -20 };
            pixel.0 = pixel.0.map(|value| (i32::from(value) + change).clamp(0, 255) as u8);
        }
        assert_eq!(retrieve(&images, &references).unwrap(), [2, 0]);
        assert!(retrieve(&images, &[]).is_err());
        assert!(retrieve(&images, &[RgbImage::new(8, 8)]).is_err());
    }

    #[test]
    fn a_sheet_has_each_image_in_its_place() {
        let red = RgbImage::from_pixel(3, 2, Rgb([255, 0, 0]));
        let blue = RgbImage::from_pixel(3, 2, Rgb([0, 0, 255]));
        let sheet = contact_sheet(&[vec![&red, &blue], vec![&blue]]);
        assert_eq!(sheet.dimensions(), (18, 16));
        let at = |x, y| sheet.get_pixel(x, y).0;
        assert_eq!([at(4, 4), at(6, 5), at(11, 4), at(4, 10)], [[255, 0, 0], [255, 0, 0], [0, 0, 255], [0, 0, 255]]);
        assert_eq!([at(3, 4), at(7, 4), at(4, 6), at(11, 10)], [[255; 3]; 4]);
    }
}
