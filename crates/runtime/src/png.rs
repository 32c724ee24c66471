//! PNG files that carry what they were made with: [`GenerationParameters`] as text chunks beside the pixels.

use crate::{Result, RuntimeError, check_images};
use ::png::{BitDepth, ColorType, Decoder, Encoder, EncodingError};
use clearform_models::ImageSize;
use image::RgbImage;
use std::fmt::Display;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::str::FromStr;

/// The parameters of an image, enough to generate it again.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationParameters {
    /// Prompt or class.
    pub prompt: String,
    /// Negative prompt; empty if there was none.
    pub negative_prompt: String,
    /// Seed of the noise of the whole batch.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// Embedded guidance scale.
    pub guidance: f64,
    /// Classifier-free guidance scale.
    pub true_cfg_scale: f64,
    /// Width and height.
    pub size: ImageSize,
    /// The model's name.
    pub model: String,
    /// The attention plan that the transformer ran with.
    pub attention: String,
    /// Adapters, as command-line options; empty if there were none.
    pub adapters: String,
    /// Position in the batch, from 1.
    pub number: usize,
    /// Number of images in the batch.
    pub batch: usize,
}

/// Writes `image` with its parameters, whole or not at all.
///
/// # Errors
/// [`RuntimeError::BadImage`] for an image of a single colour, before anything is written; the file cannot be written.
pub fn save(path: &Path, image: &RgbImage, parameters: &GenerationParameters) -> Result<()> {
    check_images(std::slice::from_ref(image))?;
    Ok(clearform_weights::write_atomically(path, &encode(image, Some(parameters))?)?)
}

/// The bytes of a PNG file.
///
/// # Errors
/// The image has no pixels.
pub fn encode(image: &RgbImage, parameters: Option<&GenerationParameters>) -> Result<Vec<u8>> {
    write(image, parameters).map_err(|error| RuntimeError::BadImage(error.to_string()))
}

/// The parameters in a file that [`save`] wrote.
///
/// # Errors
/// The file cannot be read, is not a PNG, or has no parameters of clearform.
pub fn read_parameters(path: &Path) -> Result<GenerationParameters> {
    let file = File::open(path).map_err(|source| RuntimeError::Io { path: path.to_owned(), source })?;
    let bad = |reason: &dyn Display| RuntimeError::BadImage(format!("{}: {reason}", path.display()));
    let mut reader = Decoder::new(BufReader::new(file)).read_info().map_err(|error| bad(&error))?;
    reader.finish().map_err(|error| bad(&error))?;
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
    let unicode = info.utf8_text.iter().filter_map(|chunk| Some((chunk.keyword.clone(), chunk.get_text().ok()?)));
    GenerationParameters::from_texts(&latin.chain(unicode).collect::<Vec<_>>())
        .ok_or_else(|| bad(&"has no parameters of clearform"))
}

fn write(image: &RgbImage, parameters: Option<&GenerationParameters>) -> std::result::Result<Vec<u8>, EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    for (keyword, text) in parameters.map(GenerationParameters::texts).unwrap_or_default() {
        // A tEXt chunk is limited to Latin-1; iTXt is UTF-8.
        if text.chars().all(|character| u32::from(character) < 256) {
            encoder.add_text_chunk(keyword, text)?;
        } else {
            encoder.add_itxt_chunk(keyword, text)?;
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(image.as_raw())?;
    writer.finish()?;
    Ok(bytes)
}

impl GenerationParameters {
    /// Keywords and texts of the chunks.
    fn texts(&self) -> Vec<(String, String)> {
        let texts = [
            ("Software", format!("clearform {}", env!("CARGO_PKG_VERSION"))),
            ("prompt", self.prompt.clone()),
            ("negative_prompt", self.negative_prompt.clone()),
            ("seed", self.seed.to_string()),
            ("steps", self.steps.to_string()),
            ("guidance", self.guidance.to_string()),
            ("true_cfg_scale", self.true_cfg_scale.to_string()),
            ("size", format!("{}x{}", self.size.width, self.size.height)),
            ("model", self.model.clone()),
            ("attention", self.attention.clone()),
            ("adapters", self.adapters.clone()),
            ("picture", format!("{}/{}", self.number, self.batch)),
        ];
        texts.into_iter().map(|(keyword, text)| (keyword.to_owned(), text)).collect()
    }

    fn from_texts(texts: &[(String, String)]) -> Option<Self> {
        let text = |wanted: &str| Some(texts.iter().find(|(keyword, _)| keyword == wanted)?.1.as_str());
        let (width, height) = parse_two(text("size")?, 'x')?;
        let (number, batch) = parse_two(text("picture")?, '/')?;
        Some(Self {
            prompt: text("prompt")?.to_owned(),
            negative_prompt: text("negative_prompt")?.to_owned(),
            seed: text("seed")?.parse().ok()?,
            steps: text("steps")?.parse().ok()?,
            guidance: text("guidance")?.parse().ok()?,
            true_cfg_scale: text("true_cfg_scale")?.parse().ok()?,
            size: ImageSize { height, width },
            model: text("model")?.to_owned(),
            attention: text("attention")?.to_owned(),
            adapters: text("adapters").unwrap_or_default().to_owned(),
            number,
            batch,
        })
    }
}

/// Two values with `separator` between them, as in "640x480".
fn parse_two<T: FromStr>(text: &str, separator: char) -> Option<(T, T)> {
    let (first, second) = text.split_once(separator)?;
    Some((first.parse().ok()?, second.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(prompt: &str) -> GenerationParameters {
        GenerationParameters {
            prompt: prompt.to_owned(),
            negative_prompt: String::new(),
            seed: u64::MAX,
            steps: 28,
            guidance: 3.5,
            true_cfg_scale: 1.0,
            size: ImageSize { height: 2, width: 3 },
            model: "mini-flux".to_owned(),
            attention: "clear:r=4".to_owned(),
            adapters: "--lora style:0.8".to_owned(),
            number: 2,
            batch: 4,
        }
    }

    fn small_image() -> RgbImage {
        RgbImage::from_raw(3, 2, (0..18).collect()).unwrap()
    }

    #[test]
    fn parameters_and_pixels_read_back() {
        let folder = tempfile::tempdir().unwrap();
        for prompt in ["a fox, sitting", "Füchse \u{2014} 狐 🦊\nsecond line", ""] {
            let path = folder.path().join("out.png");
            save(&path, &small_image(), &parameters(prompt)).unwrap();
            assert_eq!(read_parameters(&path).unwrap(), parameters(prompt));
            assert_eq!(image::open(&path).unwrap().into_rgb8(), small_image());
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
    fn other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.png");
        for (bytes, expected) in
            [(encode(&small_image(), None).unwrap(), "has no parameters"), (b"GIF89a".to_vec(), "other.png")]
        {
            std::fs::write(&path, bytes).unwrap();
            assert!(read_parameters(&path).unwrap_err().to_string().contains(expected));
        }
    }
}
