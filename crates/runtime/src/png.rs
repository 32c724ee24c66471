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

/// What a picture was made with: enough to make it again.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationParameters {
    /// What was to be drawn.
    pub prompt: String,
    /// What was to be stayed away from; empty for nothing.
    pub negative_prompt: String,
    /// Seed of the noise of the whole batch.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// Embedded guidance scale.
    pub guidance: f64,
    /// Classifier-free guidance scale.
    pub true_cfg_scale: f64,
    /// Extents.
    pub size: ImageSize,
    /// The model's name.
    pub model: String,
    /// The attention plan it ran with.
    pub attention: String,
    /// What acted on the model, as the command line takes it; empty for nothing.
    pub adapters: String,
    /// Which of the batch this is, from 1.
    pub number: usize,
    /// Pictures in the batch.
    pub batch: usize,
}

/// Writes `picture` with its parameters, whole or not at all.
///
/// # Errors
/// [`RuntimeError::BadPicture`] for a picture of one colour, before anything is written; else what the system says.
pub fn save(path: &Path, picture: &RgbImage, parameters: &GenerationParameters) -> Result<()> {
    check_images(std::slice::from_ref(picture))?;
    Ok(clearform_weights::write_atomically(path, &encode(picture, Some(parameters))?)?)
}

/// The bytes of a PNG file.
///
/// # Errors
/// A picture without pixels.
pub fn encode(picture: &RgbImage, parameters: Option<&GenerationParameters>) -> Result<Vec<u8>> {
    write(picture, parameters).map_err(|error| RuntimeError::BadImage(error.to_string()))
}

/// The parameters that [`save`] wrote.
///
/// # Errors
/// The file cannot be read, is no PNG, or is not one of ours.
pub fn read_parameters(path: &Path) -> Result<GenerationParameters> {
    let file = File::open(path).map_err(|source| RuntimeError::Io { path: path.to_owned(), source })?;
    let bad = |reason: &dyn Display| RuntimeError::BadImage(format!("{}: {reason}", path.display()));
    let mut reader = Decoder::new(BufReader::new(file)).read_info().map_err(|error| bad(&error))?;
    reader.finish().map_err(|error| bad(&error))?;
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
    let unicode = info.utf8_text.iter().filter_map(|chunk| Some((chunk.keyword.clone(), chunk.get_text().ok()?)));
    GenerationParameters::from_texts(&latin.chain(unicode).collect::<Vec<_>>())
        .ok_or_else(|| bad(&"has no parameters of clearform in it"))
}

fn write(picture: &RgbImage, parameters: Option<&GenerationParameters>) -> std::result::Result<Vec<u8>, EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, picture.width(), picture.height());
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    for (keyword, text) in parameters.map(GenerationParameters::texts).unwrap_or_default() {
        // tEXt holds Latin-1 alone.
        if text.chars().all(|character| u32::from(character) < 256) {
            encoder.add_text_chunk(keyword, text)?;
        } else {
            encoder.add_itxt_chunk(keyword, text)?;
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(picture.as_raw())?;
    writer.finish()?;
    Ok(bytes)
}

impl GenerationParameters {
    fn texts(&self) -> Vec<(String, String)> {
        let pairs = [
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
        pairs.into_iter().map(|(keyword, text)| (keyword.to_owned(), text)).collect()
    }

    fn from_texts(texts: &[(String, String)]) -> Option<Self> {
        let text = |wanted: &str| Some(texts.iter().find(|(keyword, _)| keyword == wanted)?.1.as_str());
        let (width, height) = pair(text("size")?, 'x')?;
        let (number, batch) = pair(text("picture")?, '/')?;
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

fn pair<T: FromStr>(text: &str, between: char) -> Option<(T, T)> {
    let (first, second) = text.split_once(between)?;
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

    fn picture() -> RgbImage {
        RgbImage::from_raw(3, 2, (0..18).collect()).unwrap()
    }

    #[test]
    fn parameters_and_pixels_come_back() {
        let folder = tempfile::tempdir().unwrap();
        for prompt in ["a fox, sitting", "Füchse \u{2014} 狐 🦊\nsecond line", ""] {
            let path = folder.path().join("out.png");
            save(&path, &picture(), &parameters(prompt)).unwrap();
            assert_eq!(read_parameters(&path).unwrap(), parameters(prompt));
            assert_eq!(image::open(&path).unwrap().into_rgb8(), picture());
        }
    }

    #[test]
    fn a_flat_picture_leaves_no_file() {
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
            [(encode(&picture(), None).unwrap(), "has no parameters"), (b"GIF89a".to_vec(), "other.png")]
        {
            std::fs::write(&path, bytes).unwrap();
            assert!(read_parameters(&path).unwrap_err().to_string().contains(expected));
        }
    }
}
