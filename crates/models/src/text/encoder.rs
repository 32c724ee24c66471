//! [`TextEncoder`]: prompts to hidden states, whatever the class of the encoder.

use crate::Result;
use candle_core::{Device, Tensor};
use clearform_weights::TensorSource;
use serde_json::Value;

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
