//! PNG files that carry what they were made with, as text chunks beside the pixels: [`GenerationParameters`] under our
//! own keys, and as the text that AUTOMATIC1111's web UI writes.

use crate::{GenerationParameters, Result, RuntimeError};
use ::png::{BitDepth, ColorType, Decoder, DecodingError, Encoder, EncodingError};
use image::RgbImage;
use std::io::Cursor;

/// The key of the web UI's text.
const WEB_UI: &str = "parameters";

/// The bytes of a PNG file.
///
/// # Errors
/// The image has no pixels.
pub fn encode(image: &RgbImage, parameters: Option<&GenerationParameters>) -> Result<Vec<u8>> {
    write(image, parameters).map_err(|error| RuntimeError::BadImage(error.to_string()))
}

/// The parameters in the bytes of a PNG file; `None` if it has none.
pub(crate) fn read_parameters(bytes: &[u8]) -> std::result::Result<Option<GenerationParameters>, DecodingError> {
    let mut reader = Decoder::new(Cursor::new(bytes)).read_info()?;
    reader.finish()?;
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
    let unicode = info.utf8_text.iter().filter_map(|chunk| Some((chunk.keyword.clone(), chunk.get_text().ok()?)));
    let texts: Vec<(String, String)> = latin.chain(unicode).collect();
    let of_web_ui = || {
        let (_, text) = texts.iter().find(|(key, _)| key == WEB_UI)?;
        GenerationParameters::from_infotext(text)
    };
    Ok(GenerationParameters::from_texts(&texts).or_else(of_web_ui))
}

fn write(image: &RgbImage, parameters: Option<&GenerationParameters>) -> std::result::Result<Vec<u8>, EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    for (keyword, text) in parameters.map(texts).unwrap_or_default() {
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

/// Keywords and texts of the chunks.
fn texts(parameters: &GenerationParameters) -> Vec<(String, String)> {
    let web_ui = (WEB_UI.to_owned(), parameters.infotext());
    std::iter::once(web_ui).chain(parameters.texts()).collect()
}
