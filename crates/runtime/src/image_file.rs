//! Image files that carry what they were made with, in the format of their name: PNG, JPEG or WebP.

use crate::{GenerationParameters, Result, RuntimeError, check_images, exif, png, xmp};
use clearform_weights::read_file;
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder as _, RgbImage};
use image_webp::{ColorType, WebPEncoder};
use std::fmt::Display;
use std::path::Path;

/// A format in which images are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// PNG, without loss.
    Png,
    /// JPEG, with quality 95.
    Jpeg,
    /// WebP, without loss.
    WebP,
}

/// Quality of JPEG files, of 100.
const JPEG_QUALITY: u8 = 95;

/// What the segments of EXIF and XMP in a JPEG file begin with.
const EXIF_SEGMENT: &[u8] = b"Exif\0\0";
const XMP_SEGMENT: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";

/// Markers of a JPEG file: its start, and its first and second application segments.
const JPEG_START: [u8; 2] = [0xff, 0xd8];
const APP0: u8 = 0xe0;
const APP1: u8 = 0xe1;

impl ImageFormat {
    /// The format of a file called `path`.
    ///
    /// # Errors
    /// [`RuntimeError::BadSetting`] for another extension than png, jpg, jpeg and webp, or none.
    pub fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        match extension.as_deref() {
            Some("png") => Ok(Self::Png),
            Some("jpg" | "jpeg") => Ok(Self::Jpeg),
            Some("webp") => Ok(Self::WebP),
            other => Err(RuntimeError::BadSetting(format!(
                "{}: expected a file name that ends in .png, .jpg, .jpeg or .webp, found {}",
                path.display(),
                other.map_or("no extension".to_owned(), |other| format!(".{other}"))
            ))),
        }
    }
}

/// Writes `image` with its parameters, whole or not at all, in the format of the file's name.
///
/// # Errors
/// [`RuntimeError::BadImage`] for an image of a single colour, before anything is written; another extension; the file
/// cannot be written.
pub fn save(path: &Path, image: &RgbImage, parameters: &GenerationParameters) -> Result<()> {
    check_images(std::slice::from_ref(image))?;
    let bytes = match ImageFormat::of(path)? {
        ImageFormat::Png => png::encode(image, Some(parameters)),
        ImageFormat::Jpeg => jpeg(image, parameters),
        ImageFormat::WebP => webp(image, parameters),
    };
    Ok(clearform_weights::write_atomically(path, &bytes?)?)
}

/// The parameters in a file that [`save`] or AUTOMATIC1111's web UI wrote.
///
/// # Errors
/// The file cannot be read, or is not a PNG, JPEG or WebP file with parameters.
pub fn read_parameters(path: &Path) -> Result<GenerationParameters> {
    let bytes = read_file(path).map_err(|source| RuntimeError::Io { path: path.to_owned(), source })?;
    let found = match bytes.get(..4) {
        Some(b"\x89PNG") => png::read_parameters(&bytes)
            .map_err(|error| RuntimeError::BadImage(format!("{}: {error}", path.display())))?,
        Some(b"RIFF") => {
            let exif = webp_chunk(&bytes, b"EXIF").map(|chunk| chunk.strip_prefix(EXIF_SEGMENT).unwrap_or(chunk));
            parameters_in(webp_chunk(&bytes, b"XMP "), exif)
        }
        Some(start) if start.starts_with(&JPEG_START) => {
            parameters_in(jpeg_segment(&bytes, XMP_SEGMENT), jpeg_segment(&bytes, EXIF_SEGMENT))
        }
        _ => return Err(RuntimeError::BadImage(format!("{}: expected a PNG, JPEG or WebP file", path.display()))),
    };
    found.ok_or_else(|| {
        RuntimeError::BadImage(format!(
            "{}: has no parameters that can be read; expected those of clearform, or of AUTOMATIC1111's web UI with \
             Steps and Seed as whole numbers from 0 on and a Size",
            path.display()
        ))
    })
}

/// The parameters under our own keys, or those of the web UI's text, which leaves open where a prompt of several lines
/// ends.
fn parameters_in(xmp: Option<&[u8]>, exif: Option<&[u8]>) -> Option<GenerationParameters> {
    let of_web_ui = || GenerationParameters::from_infotext(&exif::user_comment(exif?)?);
    xmp.and_then(xmp::parameters).or_else(of_web_ui)
}

fn bad(error: impl Display) -> RuntimeError {
    RuntimeError::BadImage(error.to_string())
}

fn jpeg(image: &RgbImage, parameters: &GenerationParameters) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY);
    encoder.set_exif_metadata(exif::with_user_comment(&parameters.infotext())).map_err(bad)?;
    encoder.write_image(image.as_raw(), image.width(), image.height(), ExtendedColorType::Rgb8).map_err(bad)?;
    let segment = [XMP_SEGMENT, xmp::packet(parameters).as_bytes()].concat();
    let length = u16::try_from(segment.len() + 2)
        .map_err(|_| bad("the parameters are too long for a JPEG file; write a PNG file"))?;
    // After the segments that readers expect at the start.
    let place = jpeg_segments(&bytes).take_while(|(marker, _)| [APP0, APP1].contains(marker)).last();
    let place = place.map_or(JPEG_START.len(), |(_, content)| content.end);
    let inserted = [&[0xff, APP1][..], &length.to_be_bytes(), &segment].concat();
    drop(bytes.splice(place..place, inserted));
    Ok(bytes)
}

fn webp(image: &RgbImage, parameters: &GenerationParameters) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = WebPEncoder::new(&mut bytes);
    encoder.set_exif_metadata(exif::with_user_comment(&parameters.infotext()));
    encoder.set_xmp_metadata(xmp::packet(parameters).into_bytes());
    encoder.encode(image.as_raw(), image.width(), image.height(), ColorType::Rgb8).map_err(bad)?;
    Ok(bytes)
}

/// Marker and content of the segments of a JPEG file, up to the image data.
fn jpeg_segments(bytes: &[u8]) -> impl Iterator<Item = (u8, std::ops::Range<usize>)> + '_ {
    const IMAGE_DATA: u8 = 0xda;
    let mut at = JPEG_START.len();
    std::iter::from_fn(move || {
        let &[0xff, marker, high, low] = bytes.get(at..)?.first_chunk()? else { return None };
        let content = at + 4..at + 2 + usize::from(u16::from_be_bytes([high, low]));
        at = content.end;
        (marker != IMAGE_DATA && content.end <= bytes.len() && content.start <= content.end)
            .then_some((marker, content))
    })
}

/// What follows `start` in the first application segment of a JPEG file that begins with it.
fn jpeg_segment<'a>(bytes: &'a [u8], start: &[u8]) -> Option<&'a [u8]> {
    let mut segments = jpeg_segments(bytes).filter(|(marker, _)| *marker == APP1);
    segments.find_map(|(_, content)| bytes[content].strip_prefix(start))
}

/// The first chunk called `wanted` of a WebP file.
fn webp_chunk<'a>(bytes: &'a [u8], wanted: &[u8; 4]) -> Option<&'a [u8]> {
    /// "RIFF", the size, "WEBP".
    const HEADER: usize = 12;
    let mut rest = bytes.get(HEADER..)?;
    loop {
        let (name, after) = rest.split_at_checked(4)?;
        let (size, after) = after.split_at_checked(4)?;
        let size = u32::from_le_bytes(size.try_into().ok()?) as usize;
        let content = after.get(..size)?;
        if name == wanted {
            return Some(content);
        }
        rest = after.get(size + size % 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::tests::parameters;
    use std::path::PathBuf;

    fn small_image() -> RgbImage {
        RgbImage::from_raw(3, 2, (0..18).collect()).unwrap()
    }

    #[test]
    fn parameters_and_pixels_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let of_several_lines = "F\u{fc}chse \u{2014} \u{72d0} \u{1f98a}\nsecond <line> & \"more\"";
        // As the web UI's text would be read otherwise.
        let like_settings = "a fox\nNegative prompt: blurred\nSteps: 7, Seed: 1, Size: 64x64";
        for prompt in ["a fox, sitting", of_several_lines, like_settings, " \n", ""] {
            for (name, most) in [("out.png", 0), ("out.webp", 0), ("out.jpg", 12), ("out.JPEG", 12)] {
                let path = folder.path().join(name);
                save(&path, &small_image(), &parameters(prompt)).unwrap();
                assert_eq!(read_parameters(&path).unwrap(), parameters(prompt), "{name}");
                let read = image::load_from_memory(&std::fs::read(&path).unwrap()).unwrap().into_rgb8();
                let largest = read.iter().zip(small_image().iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                assert!(largest <= most, "{name}: {largest}");
            }
        }
    }

    /// Written by Pillow, as the web UI writes them.
    #[test]
    fn images_of_the_web_ui_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/images");
        for name in ["web-ui.png", "big.jpg", "little.jpg", "little.webp"] {
            let read = read_parameters(&folder.join(name)).unwrap();
            assert_eq!(
                (read.prompt.as_str(), read.negative_prompt.as_str()),
                ("a red apple, \u{72d0}", "blurred"),
                "{name}"
            );
            assert_eq!((read.seed, read.steps, read.guidance), (5, 20, Some(7.0)), "{name}");
        }
    }

    #[test]
    fn other_extensions_are_refused() {
        for (name, found) in
            [("out", "no extension"), ("-", "no extension"), ("out.gif", ".gif"), ("a.png/b", "no ext")]
        {
            let error = ImageFormat::of(&PathBuf::from(name)).unwrap_err().to_string();
            assert!(error.contains(".png, .jpg, .jpeg or .webp") && error.contains(found), "{error}");
        }
    }

    #[test]
    fn an_image_of_a_single_colour_is_not_saved() {
        let path = tempfile::tempdir().unwrap().path().join("out.png");
        let flat = RgbImage::new(3, 2);
        assert!(matches!(save(&path, &flat, &parameters("")), Err(RuntimeError::BadImage(_))));
        assert!(!path.exists());
    }

    #[test]
    fn files_without_parameters_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.png");
        let cut: Vec<u8> = jpeg(&small_image(), &parameters("a")).unwrap()[..20].to_vec();
        let cases = [
            (png::encode(&small_image(), None).unwrap(), "has no parameters"),
            (b"GIF89a".to_vec(), "other.png: expected a PNG, JPEG or WebP file"),
            (b"\x89PNG".to_vec(), "other.png"),
            (cut, "has no parameters"),
            (b"RIFF\0\0\0\0WEBPEXIF\xff\xff\xff\xff".to_vec(), "has no parameters"),
        ];
        for (bytes, expected) in cases {
            std::fs::write(&path, bytes).unwrap();
            let error = read_parameters(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
