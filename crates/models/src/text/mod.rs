//! Text encoders and their tokenizers: what turns a prompt into the conditions of a denoiser.
//!
//! The main types are [`TextEncoders`], which a family asks for what it needs, and [`ClipText`], [`T5Encoder`], [`ClipTokenizer`] and [`T5Tokenizer`]. The encoders compute in f32
//! whatever the stored number format. Nothing here knows a pipeline or a file.

mod clip;
mod sentencepiece;
mod t5;
mod tokenizers;
mod trusted;

pub use clip::{ClipConfig, ClipEncoded, ClipText};
pub use t5::{T5Config, T5Encoder};
pub use tokenizers::{ClipTokenizer, T5Tokenizer};

/// The text encoders of a pipeline, by number: 1 is `text_encoder` with `tokenizer`, and n is `text_encoder_n` with
/// `tokenizer_n`. Each is loaded when it is asked and released after.
pub trait TextEncoders {
    /// Whether the pipeline has encoder `number`; some families can do without one.
    fn has(&self, number: usize) -> bool;

    /// The length that the tokenizer `number` was made for, if it tells one.
    ///
    /// # Errors
    /// Its files cannot be read.
    fn tokenizer_length(&self, number: usize) -> Result<Option<usize>>;

    /// Encodes prompts with CLIP, cut and padded to the encoder's own length.
    ///
    /// # Errors
    /// The encoder cannot be had.
    fn clip(&self, number: usize, prompts: &[String]) -> Result<ClipEncoded>;

    /// Encodes prompts with T5, cut and padded to `tokens`; all tokens see the padding.
    ///
    /// # Shapes
    /// The result is (prompts, tokens, channels).
    ///
    /// # Errors
    /// The encoder cannot be had.
    fn t5(&self, number: usize, prompts: &[String], tokens: usize) -> Result<Tensor>;

    /// Encodes prompts with T5, cut and padded to `tokens`; padding is hidden, and zero in the result.
    ///
    /// # Shapes
    /// The result is (prompts, tokens, channels) and (prompts, tokens), 1 where a token counts.
    ///
    /// # Errors
    /// The encoder cannot be had.
    fn t5_masked(&self, number: usize, prompts: &[String], tokens: usize) -> Result<(Tensor, Tensor)>;
}

use crate::{ModelError, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use clearform_weights::TensorSource;
use std::collections::HashMap;

/// Every tensor of `source` in f32, under the names that `rename` gives. One tensor is converted at a time, so that a
/// bf16 encoder does not stand in memory twice.
fn f32_weights(source: &dyn TensorSource, rename: impl Fn(&str) -> String) -> Result<VarBuilder<'static>> {
    let mut tensors = HashMap::new();
    let mut device = Device::Cpu;
    for info in source.tensors() {
        let tensor = source.tensor(&info.name)?.to_dtype(DType::F32)?;
        device = tensor.device().clone();
        tensors.insert(rename(&info.name), tensor);
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &device))
}

/// Checks token ids against a vocabulary and gives them as the embedding wants them.
///
/// # Shapes
/// (batch, tokens) of any integer type -> the same in u32.
fn checked_ids(ids: &Tensor, vocabulary: usize) -> Result<Tensor> {
    let ids = ids.to_dtype(DType::U32)?;
    let (_, tokens) = ids.dims2().map_err(|_| ModelError::bad_input("ids", "expected shape (batch, tokens)"))?;
    let largest = if tokens == 0 { 0 } else { ids.flatten_all()?.max(0)?.to_scalar::<u32>()? };
    if tokens == 0 || largest as usize >= vocabulary {
        let reason = format!("{tokens} tokens, the largest {largest}, for a vocabulary of {vocabulary}");
        return Err(ModelError::bad_input("ids", format!("{reason}; does the tokenizer belong to this encoder?")));
    }
    Ok(ids)
}
