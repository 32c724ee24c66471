//! [`TextEncoder`]: prompts to hidden states, whatever the class of the encoder.

use crate::Result;
use candle_core::{Device, Tensor};
use clearform_weights::TensorSource;
use serde_json::Value;
use std::fmt;

/// A text encoder with its tokenizer, its weights loaded.
pub trait TextEncoder: Send + Sync {
    /// Encodes prompts, truncated and padded as `request` says.
    ///
    /// # Errors
    /// A prompt that cannot be tokenized, or a tensor operation that failed.
    fn encode(&self, prompts: &[String], request: &TextRequest) -> Result<EncodedText>;
}

/// Which encoder a family asks, and how prompts are truncated and padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextRequest {
    /// Name of the component in the family's pipeline ("text_encoder_2").
    pub component: &'static str,
    /// The class in transformers, one of [`TEXT_ENCODERS`](super::TEXT_ENCODERS).
    pub class: &'static str,
    /// Number of tokens.
    pub tokens: TokenCount,
    /// What padding does.
    pub padding: Padding,
}

/// How many tokens prompts are truncated and padded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenCount {
    /// This many.
    Exactly(usize),
    /// This many, or the tokenizer's `model_max_length` if that is less.
    AtMost(usize),
    /// The encoder's maximum, or the tokenizer's `model_max_length` if that is less.
    Maximum,
}

/// What padding does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// It is encoded like other tokens (FLUX, SD3).
    Attended,
    /// No token attends to it, and its hidden states are zero (PixArt).
    Masked,
}

/// The outputs of an encoder; those that its class does not have are `None`.
#[derive(Debug, Clone)]
pub struct EncodedText {
    /// `last_hidden_state`, (prompts, tokens, channels).
    pub hidden: Tensor,
    /// `hidden_states[-2]`, (prompts, tokens, channels).
    pub penultimate: Option<Tensor>,
    /// `pooler_output`, (prompts, channels).
    pub pooled: Option<Tensor>,
    /// `text_embeds`: the projection of `pooled`, (prompts, channels).
    pub projected: Option<Tensor>,
    /// 1 for tokens and 0 for padding, (prompts, tokens); only with [`Padding::Masked`].
    pub mask: Option<Tensor>,
    /// Prompts that were longer than the encoder takes.
    pub truncated: Vec<TruncatedPrompt>,
}

/// A prompt of which a text encoder reads only the beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TruncatedPrompt {
    /// The text encoder's component and class.
    pub encoder: [&'static str; 2],
    /// The prompt.
    pub prompt: String,
    /// Its tokens, with those that mark start and end.
    pub tokens: usize,
    /// How many of them the encoder takes.
    pub limit: usize,
}

/// Characters of a prompt by which a message names it.
const QUOTED: usize = 40;

impl fmt::Display for TruncatedPrompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { encoder: [component, class], prompt, tokens, limit } = self;
        let begin: String = prompt.chars().take(QUOTED).collect();
        let more = if begin.len() < prompt.len() { "..." } else { "" };
        let cut = tokens - limit;
        write!(
            f,
            "{component} ({class}) takes {limit} tokens; the prompt {begin:?}{more} has {tokens}: the last {cut} are \
             cut"
        )
    }
}

/// The files of a text encoder and its tokenizer. This crate opens none itself.
pub trait TextEncoderFiles {
    /// The encoder's config.json.
    ///
    /// # Errors
    /// It cannot be read.
    fn config(&self) -> Result<Value>;

    /// The encoder's tensors, under the names of its class.
    ///
    /// # Errors
    /// They cannot be read.
    fn weights(&self) -> Result<Box<dyn TensorSource + '_>>;

    /// A file of the tokenizer; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read.
    fn tokenizer_file(&self, name: &str) -> Result<Option<Vec<u8>>>;

    /// A file that the tokenizer cannot do without.
    ///
    /// # Errors
    /// It is missing or cannot be read; the message names its folder.
    fn required_tokenizer_file(&self, name: &str) -> Result<Vec<u8>>;

    /// The device that the encoder runs on.
    fn device(&self) -> &Device;
}

/// The text encoders of a pipeline.
pub trait TextEncoders {
    /// Whether the pipeline has the component. SD3 can run without its third encoder.
    fn has(&self, component: &str) -> bool;

    /// Encodes prompts with the encoder that `request` names.
    ///
    /// # Errors
    /// The encoder is not available.
    fn encode(&self, prompts: &[String], request: &TextRequest) -> Result<EncodedText>;
}

impl TextRequest {
    /// Those of `prompts` that have more than `limit` tokens, as `count` counts them.
    pub(super) fn truncated(
        &self,
        prompts: &[String],
        limit: usize,
        count: impl Fn(&str) -> Result<usize>,
    ) -> Result<Vec<TruncatedPrompt>> {
        let counted = prompts.iter().map(|prompt| Ok((prompt, count(prompt)?))).collect::<Result<Vec<_>>>()?;
        let too_long = counted.into_iter().filter(|(_, tokens)| *tokens > limit);
        let encoder = [self.component, self.class];
        let truncated =
            |(prompt, tokens): (&String, usize)| TruncatedPrompt { encoder, prompt: prompt.clone(), tokens, limit };
        Ok(too_long.map(truncated).collect())
    }
}

impl TokenCount {
    /// The number of tokens for a tokenizer with `model_max_length` and an encoder that takes up to `maximum`.
    pub(super) fn resolve(self, model_max_length: Option<usize>, maximum: Option<usize>) -> usize {
        let limit = model_max_length.unwrap_or(usize::MAX);
        match self {
            Self::Exactly(tokens) => tokens,
            Self::AtMost(tokens) => tokens.min(limit),
            Self::Maximum => limit.min(maximum.unwrap_or(usize::MAX)),
        }
    }
}
