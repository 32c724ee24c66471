//! [`TEXT_ENCODERS`]: the classes of text encoders.

use super::encoder::{TextEncoder, TextEncoderFiles};
use super::prompt_encoders::{check_clip, check_t5, load_clip, load_t5};
use crate::Result;

/// A class of text encoders.
pub struct TextEncoderClass {
    /// Its names in transformers, as in the key `architectures` of config.json.
    pub names: &'static [&'static str],
    /// Whether it reads its blocks one by one from a source that is streamed.
    pub streams: bool,
    /// Loads one.
    pub load: fn(&dyn TextEncoderFiles) -> Result<Box<dyn TextEncoder>>,
    /// Reads what [`Self::load`] does, without the weights.
    pub check: fn(&dyn TextEncoderFiles) -> Result<()>,
}

/// Every class of text encoders.
pub const TEXT_ENCODERS: &[TextEncoderClass] = &[
    TextEncoderClass {
        names: &["CLIPTextModel", "CLIPTextModelWithProjection"],
        streams: false,
        load: load_clip,
        check: check_clip,
    },
    TextEncoderClass {
        names: &["T5EncoderModel", "T5ForConditionalGeneration"],
        streams: true,
        load: load_t5,
        check: check_t5,
    },
];
