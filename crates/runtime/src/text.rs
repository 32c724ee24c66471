//! [`PipelineTextEncoders`]: the text encoders of a pipeline. Each is loaded when a family calls it and released after the
//! call. How their outputs are combined is up to the family.

use crate::{Components, Result, RuntimeError};
use candle_core::{DType, Device, Tensor};
use clearform_models::ModelError;
use clearform_models::text::{
    ClipConfig, ClipEncoded, ClipText, ClipTokenizer, T5Config, T5Encoder, T5Tokenizer, TextEncoders,
};
use clearform_plugin_host::{LowRankMode, PatchedSource, WeightEdits};
use clearform_weights::{InMemoryTensors, TensorSource};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The text encoders of a pipeline, with the edits of adapters.
pub(crate) struct PipelineTextEncoders<'a> {
    pub components: &'a Components,
    pub edits: &'a WeightEdits,
    pub device: &'a Device,
}

/// The weights of `component`, a VAE or CLIP, with the edits of adapters, ready to be built on `device`. Low-rank edits are
/// merged, since convolutions cannot add a low-rank product.
pub(crate) fn open_weights<'a>(
    components: &Components,
    component: &str,
    edits: &'a WeightEdits,
    device: &Device,
) -> Result<Box<dyn TensorSource + 'a>> {
    let patched = PatchedSource::new(components.weights(component)?, edits, component, LowRankMode::Fused);
    Ok(match device {
        Device::Cpu => Box::new(patched),
        // These models compute in f32. Converting on the CPU avoids a second copy in the memory of the GPU.
        _ => Box::new(InMemoryTensors::load(&patched, Some(DType::F32), device)?),
    })
}

impl TextEncoders for PipelineTextEncoders<'_> {
    fn has(&self, number: usize) -> bool {
        self.components.has(&numbered("text_encoder", number))
    }

    fn tokenizer_length(&self, number: usize) -> clearform_models::Result<Option<usize>> {
        self.configured_length(number).map_err(model_error)
    }

    fn clip(&self, number: usize, prompts: &[String]) -> clearform_models::Result<ClipEncoded> {
        self.encode_clip(number, prompts).map_err(model_error)
    }

    fn t5(&self, number: usize, prompts: &[String], tokens: usize) -> clearform_models::Result<Tensor> {
        let ids = self.t5_ids(number, prompts, tokens).map_err(model_error)?;
        self.build_t5(number).map_err(model_error)?.encode(&Tensor::new(ids, self.device)?, None)
    }

    /// Encodes the prompts together, padded to the longest of them: padding that is masked changes nothing.
    fn t5_masked(
        &self,
        number: usize,
        prompts: &[String],
        tokens: usize,
    ) -> clearform_models::Result<(Tensor, Tensor)> {
        let ids = self.t5_ids(number, prompts, tokens).map_err(model_error)?;
        let encoder = self.build_t5(number).map_err(model_error)?;
        let lengths: Vec<usize> = ids.iter().map(|ids| length_without_padding(ids)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let mask = |length: &usize| (0..tokens).map(|token| f32::from(token < *length)).collect();
        let mask = Tensor::new(lengths.iter().map(mask).collect::<Vec<Vec<f32>>>(), self.device)?;
        let ids = Tensor::new(ids, self.device)?.narrow(1, 0, longest)?;
        let shown = mask.narrow(1, 0, longest)?;
        let features = encoder.encode(&ids, Some(&shown))?.broadcast_mul(&shown.unsqueeze(2)?)?;
        Ok((features.pad_with_zeros(1, 0, tokens - longest)?, mask))
    }
}

/// The padding token of every T5.
const T5_PAD: u32 = 0;

/// At least one token: an encoder needs something to attend to.
fn length_without_padding(ids: &[u32]) -> usize {
    ids.iter().rposition(|id| *id != T5_PAD).map_or(1, |last| last + 1)
}

impl PipelineTextEncoders<'_> {
    fn encode_clip(&self, number: usize, prompts: &[String]) -> Result<ClipEncoded> {
        let component = numbered("text_encoder", number);
        let config = ClipConfig::new(&self.components.config(&component)?)?;
        let tokenizer = self.clip_tokenizer(&numbered("tokenizer", number))?;
        let length = tokenizer.max_length().unwrap_or(usize::MAX).min(config.max_tokens());
        let ids = prompts.iter().map(|prompt| tokenizer.encode(prompt, length));
        let ids = ids.collect::<clearform_models::Result<Vec<_>>>()?;
        let encoder = ClipText::build(config, self.weights(&component)?.as_ref())?;
        Ok(encoder.encode(&Tensor::new(ids, self.device)?)?)
    }

    fn t5_ids(&self, number: usize, prompts: &[String], tokens: usize) -> Result<Vec<Vec<u32>>> {
        let tokenizer = self.t5_tokenizer(&numbered("tokenizer", number))?;
        let ids = prompts.iter().map(|prompt| tokenizer.encode(prompt, tokens));
        Ok(ids.collect::<clearform_models::Result<_>>()?)
    }

    fn build_t5(&self, number: usize) -> Result<T5Encoder> {
        let component = numbered("text_encoder", number);
        let config = T5Config::new(&self.components.config(&component)?)?;
        Ok(T5Encoder::build(config, &self.t5_weights(&component)?)?)
    }

    /// Weights in their stored dtype, which the encoder converts where it uses them, with low-rank edits beside them.
    fn t5_weights(&self, component: &str) -> Result<impl TensorSource + '_> {
        let mut stored = self.components.weights(component)?;
        if !self.device.is_cpu() {
            stored = Box::new(InMemoryTensors::load(&stored, None, self.device)?);
        }
        Ok(PatchedSource::new(stored, self.edits, component, LowRankMode::Separate))
    }

    fn weights(&self, component: &str) -> Result<Box<dyn TensorSource + '_>> {
        open_weights(self.components, component, self.edits, self.device)
    }

    /// transformers wrote vocab.json and merges.txt before it wrote tokenizer.json.
    fn clip_tokenizer(&self, component: &str) -> Result<ClipTokenizer> {
        let bytes = |file| self.components.bytes(component, file);
        let settings = bytes(TOKENIZER_CONFIG)?;
        Ok(match (bytes("vocab.json")?, bytes("merges.txt")?) {
            (Some(vocab), Some(merges)) => ClipTokenizer::from_vocabulary(&vocab, &merges, settings.as_deref())?,
            _ => ClipTokenizer::from_json(&self.required(component, TOKENIZER)?, settings.as_deref())?,
        })
    }

    /// transformers wrote only spiece.model before it wrote tokenizer.json.
    fn t5_tokenizer(&self, component: &str) -> Result<T5Tokenizer> {
        let bytes = |file| self.components.bytes(component, file);
        Ok(match (bytes(TOKENIZER)?, bytes("spiece.model")?) {
            (None, Some(model)) => T5Tokenizer::from_sentencepiece(&model, bytes(TOKENIZER_CONFIG)?.as_deref())?,
            _ => T5Tokenizer::from_json(&self.required(component, TOKENIZER)?)?,
        })
    }

    /// The `model_max_length` of a tokenizer's config.
    fn configured_length(&self, number: usize) -> Result<Option<usize>> {
        let component = numbered("tokenizer", number);
        let Some(_) = self.components.bytes(&component, TOKENIZER_CONFIG)? else { return Ok(None) };
        let length = self.components.json(&component, TOKENIZER_CONFIG)?["model_max_length"].as_u64();
        Ok(length.map(|length| length as usize))
    }

    fn required(&self, component: &str, file: &str) -> Result<Vec<u8>> {
        if let Some(bytes) = self.components.bytes(component, file)? {
            return Ok(bytes);
        }
        let reason = format!("{file} is missing. Save the tokenizer with transformers 4.30 or newer, or copy the file");
        Err(RuntimeError::BadComponent { path: self.components.folder(component)?, reason })
    }
}

/// The name of a component with its number, as diffusers counts: `tokenizer`, `tokenizer_2`.
fn numbered(name: &str, number: usize) -> String {
    if number == 1 { name.to_owned() } else { format!("{name}_{number}") }
}

/// The error as families return it.
fn model_error(error: RuntimeError) -> ModelError {
    match error {
        RuntimeError::Model(error) => error,
        other => ModelError::Encoder(Box::new(other)),
    }
}
