//! The classes of [`TextEncoder`]: CLIP and T5 with their tokenizers.

use super::encoder::{EncodedText, Padding, TextEncoder, TextEncoderFiles, TextRequest};
use super::{ClipConfig, ClipEncoded, ClipText, ClipTokenizer, T5Config, T5Encoder, T5Tokenizer, tokenizer_config};
use crate::{ModelError, Result};
use candle_core::{Device, Tensor};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The padding token of every T5.
const T5_PAD: u32 = 0;

/// `CLIPTextModel` or `CLIPTextModelWithProjection`.
struct ClipPromptEncoder {
    encoder: ClipText,
    tokenizer: ClipTokenizer,
    max_tokens: usize,
    device: Device,
}

/// `T5EncoderModel`.
struct T5PromptEncoder {
    encoder: T5Encoder,
    tokenizer: T5Tokenizer,
    model_max_length: Option<usize>,
    device: Device,
}

/// Loads a CLIP text encoder with its tokenizer.
pub(super) fn load_clip(files: &dyn TextEncoderFiles) -> Result<Box<dyn TextEncoder>> {
    let config = ClipConfig::new(&files.config()?)?;
    Ok(Box::new(ClipPromptEncoder {
        max_tokens: config.max_tokens(),
        tokenizer: clip_tokenizer(files)?,
        encoder: ClipText::build(config, files.weights()?.as_ref())?,
        device: files.device().clone(),
    }))
}

/// Checks the config and the tokenizer of a CLIP text encoder.
pub(super) fn check_clip(files: &dyn TextEncoderFiles) -> Result<()> {
    ClipConfig::new(&files.config()?)?;
    clip_tokenizer(files).map(drop)
}

/// Checks the config and the tokenizer of a T5 encoder.
pub(super) fn check_t5(files: &dyn TextEncoderFiles) -> Result<()> {
    T5Config::new(&files.config()?)?;
    tokenizer_config::TokenizerConfig::parse(files.tokenizer_file(TOKENIZER_CONFIG)?.as_deref())?;
    t5_tokenizer(files).map(drop)
}

/// Loads a T5 encoder with its tokenizer.
pub(super) fn load_t5(files: &dyn TextEncoderFiles) -> Result<Box<dyn TextEncoder>> {
    let config = T5Config::new(&files.config()?)?;
    let settings = files.tokenizer_file(TOKENIZER_CONFIG)?;
    Ok(Box::new(T5PromptEncoder {
        model_max_length: tokenizer_config::TokenizerConfig::parse(settings.as_deref())?.max_length(),
        tokenizer: t5_tokenizer(files)?,
        encoder: T5Encoder::build(config, files.weights()?.as_ref())?,
        device: files.device().clone(),
    }))
}

impl TextEncoder for ClipPromptEncoder {
    fn encode(&self, prompts: &[String], request: &TextRequest) -> Result<EncodedText> {
        if request.padding == Padding::Masked {
            let reason = "CLIP has no mask for padding: its pooled output is that of the end token";
            return Err(ModelError::bad_input(request.component, reason));
        }
        let length = request.tokens.resolve(self.tokenizer.max_length(), Some(self.max_tokens));
        let ids = prompts.iter().map(|prompt| self.tokenizer.encode(prompt, length)).collect::<Result<Vec<_>>>()?;
        let truncated = request.truncated(prompts, length, |prompt| self.tokenizer.count(prompt))?;
        let ClipEncoded { hidden, penultimate, pooled, projected } =
            self.encoder.encode(&Tensor::new(ids, &self.device)?)?;
        let (penultimate, pooled) = (Some(penultimate), Some(pooled));
        Ok(EncodedText { hidden, penultimate, pooled, projected, mask: None, truncated })
    }
}

impl TextEncoder for T5PromptEncoder {
    fn encode(&self, prompts: &[String], request: &TextRequest) -> Result<EncodedText> {
        let tokens = request.tokens.resolve(self.model_max_length, None);
        let ids = prompts.iter().map(|prompt| self.tokenizer.encode(prompt, tokens)).collect::<Result<Vec<_>>>()?;
        let truncated = request.truncated(prompts, tokens, |prompt| self.tokenizer.count(prompt))?;
        let (hidden, mask) = match request.padding {
            Padding::Attended => (self.encoder.encode(&Tensor::new(ids, &self.device)?, None)?, None),
            Padding::Masked => self.encode_masked(ids, tokens)?,
        };
        Ok(EncodedText { hidden, penultimate: None, pooled: None, projected: None, mask, truncated })
    }
}

impl T5PromptEncoder {
    /// Encodes the prompts together, padded to the longest of them: padding that is masked changes nothing.
    fn encode_masked(&self, ids: Vec<Vec<u32>>, tokens: usize) -> Result<(Tensor, Option<Tensor>)> {
        let lengths: Vec<usize> = ids.iter().map(|ids| length_without_padding(ids)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let mask = |length: &usize| (0..tokens).map(|token| f32::from(token < *length)).collect();
        let mask = Tensor::new(lengths.iter().map(mask).collect::<Vec<Vec<f32>>>(), &self.device)?;
        let ids = Tensor::new(ids, &self.device)?.narrow(1, 0, longest)?;
        let shown = mask.narrow(1, 0, longest)?;
        let hidden = self.encoder.encode(&ids, Some(&shown))?.broadcast_mul(&shown.unsqueeze(2)?)?;
        Ok((hidden.pad_with_zeros(1, 0, tokens - longest)?, Some(mask)))
    }
}

/// At least one token: an encoder needs something to attend to.
fn length_without_padding(ids: &[u32]) -> usize {
    ids.iter().rposition(|id| *id != T5_PAD).map_or(1, |last| last + 1)
}

/// transformers wrote vocab.json and merges.txt before it wrote tokenizer.json.
fn clip_tokenizer(files: &dyn TextEncoderFiles) -> Result<ClipTokenizer> {
    let settings = files.tokenizer_file(TOKENIZER_CONFIG)?;
    match (files.tokenizer_file("vocab.json")?, files.tokenizer_file("merges.txt")?) {
        (Some(vocab), Some(merges)) => ClipTokenizer::from_vocabulary(&vocab, &merges, settings.as_deref()),
        (vocab, merges) => {
            // The file that is asked for is the one that completes what is there.
            let name = match (files.tokenizer_file(TOKENIZER)?, vocab, merges) {
                (None, Some(_), None) => "merges.txt",
                (None, None, Some(_)) => "vocab.json",
                _ => TOKENIZER,
            };
            ClipTokenizer::from_json(&files.required_tokenizer_file(name)?, settings.as_deref())
        }
    }
}

/// transformers wrote only spiece.model before it wrote tokenizer.json.
fn t5_tokenizer(files: &dyn TextEncoderFiles) -> Result<T5Tokenizer> {
    match (files.tokenizer_file(TOKENIZER)?, files.tokenizer_file("spiece.model")?) {
        (None, Some(model)) => {
            T5Tokenizer::from_sentencepiece(&model, files.tokenizer_file(TOKENIZER_CONFIG)?.as_deref())
        }
        _ => T5Tokenizer::from_json(&files.required_tokenizer_file(TOKENIZER)?),
    }
}
