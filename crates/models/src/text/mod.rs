//! Text encoders and tokenizers of the pipelines: [`ClipText`] and [`ClipTokenizer`], [`T5Encoder`] and
//! [`T5Tokenizer`].
//!
//! A family requests encodings from [`TextEncoders`]. The encoders compute in f32 whatever the dtype of the weights.

mod clip;
mod sentencepiece;
mod t5;
mod tokenizer_config;
mod tokenizers;
mod validation;

pub use clip::{ClipConfig, ClipEncoded, ClipText};
pub use t5::{T5Config, T5Encoder};
pub use tokenizers::{ClipTokenizer, T5Tokenizer};

use crate::{ModelError, Result};
use candle_core::{DType, Tensor};

/// The text encoders of a pipeline, numbered as in its folder: 1 is `text_encoder` with `tokenizer`, n is
/// `text_encoder_n` with `tokenizer_n`. An encoder is loaded when it is used and released afterwards.
pub trait TextEncoders {
    /// Whether the pipeline has encoder `number`. SD3 can run without its third.
    fn has(&self, number: usize) -> bool;

    /// `model_max_length` of tokenizer `number`, if it has one.
    ///
    /// # Errors
    /// Its files cannot be read.
    fn tokenizer_length(&self, number: usize) -> Result<Option<usize>>;

    /// Encodes prompts with CLIP, truncated and padded to the encoder's maximum length.
    ///
    /// # Errors
    /// The encoder is not available.
    fn clip(&self, number: usize, prompts: &[String]) -> Result<ClipEncoded>;

    /// Encodes prompts with T5, truncated and padded to `tokens`, without an attention mask (FLUX, SD3).
    ///
    /// # Shapes
    /// The result is (prompts, tokens, channels).
    ///
    /// # Errors
    /// The encoder is not available.
    fn t5(&self, number: usize, prompts: &[String], tokens: usize) -> Result<Tensor>;

    /// Encodes prompts with T5, truncated and padded to `tokens`, with padding masked (PixArt). Masked positions of the
    /// result are zero.
    ///
    /// # Shapes
    /// The result is (prompts, tokens, channels) and a mask (prompts, tokens), 1 for tokens and 0 for padding.
    ///
    /// # Errors
    /// The encoder is not available.
    fn t5_masked(&self, number: usize, prompts: &[String], tokens: usize) -> Result<(Tensor, Tensor)>;
}

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
