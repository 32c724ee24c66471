//! Text encoders and tokenizers of the pipelines: [`ClipText`] and [`ClipTokenizer`], [`T5Encoder`] and
//! [`T5Tokenizer`].
//!
//! A family asks [`TextEncoders`] for what it needs, by component and class; [`TEXT_ENCODERS`] lists the classes. The
//! encoders compute in f32 whatever the dtype of the weights.

mod clean_caption;
mod clip;
mod encoder;
mod encoder_classes;
mod fix_text;
mod html_text;
mod mojibake;
mod prompt_encoders;
mod sentencepiece;
mod t5;
mod tokenizer_config;
mod tokenizers;
mod validation;

pub use clean_caption::CaptionCleaner;
pub use clip::{ClipConfig, ClipEncoded, ClipText};
pub use encoder::{
    EncodedText, Padding, TextEncoder, TextEncoderFiles, TextEncoders, TextRequest, TokenCount, TruncatedPrompt,
};
pub use encoder_classes::{TEXT_ENCODERS, TextEncoderClass};
pub use t5::{T5Config, T5Encoder};
pub use tokenizers::{ClipTokenizer, T5Tokenizer};

use crate::{ModelError, Result};
use candle_core::{DType, Tensor};

/// Checks token ids against the vocabulary and converts them to u32.
///
/// # Shapes
/// (batch, tokens) of any integer type -> the same in u32.
fn checked_ids(ids: &Tensor, vocabulary: usize) -> Result<Tensor> {
    let ids = ids.to_dtype(DType::U32)?;
    let (_, tokens) = ids.dims2().map_err(|_| ModelError::bad_input("ids", "expected shape (batch, tokens)"))?;
    let largest = if tokens == 0 { 0 } else { ids.flatten_all()?.max(0)?.to_scalar::<u32>()? };
    if tokens == 0 || largest as usize >= vocabulary {
        let found = format!("found {tokens} tokens, the largest {largest}");
        let reason =
            format!("expected ids below the vocabulary size {vocabulary}, {found}; use this encoder's tokenizer");
        return Err(ModelError::bad_input("ids", reason));
    }
    Ok(ids)
}
