//! [`PipelineTextEncoders`]: the text encoders of a model folder, each loaded when a family asks it, used and released. It does not
//! know what a family makes of them.

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

/// The text encoders of a model, as adapters edit them.
pub(crate) struct PipelineTextEncoders<'a> {
    pub components: &'a Components,
    pub edits: &'a WeightEdits,
    pub device: &'a Device,
}

/// The weights of a part as adapters edit them, ready to be built from on `device`. These parts are built by others, who
/// add nothing beside a product.
pub(crate) fn open_weights<'a>(
    components: &Components,
    part: &str,
    edits: &'a WeightEdits,
    device: &Device,
) -> Result<Box<dyn TensorSource + 'a>> {
    let patched = PatchedSource::new(components.weights(part)?, edits, part, LowRankMode::Fused);
    Ok(match device {
        Device::Cpu => Box::new(patched),
        // They compute in f32. Widened on the way, they do not stand twice in the memory of a GPU.
        _ => Box::new(InMemoryTensors::load(&patched, Some(DType::F32), device)?),
    })
}

impl TextEncoders for PipelineTextEncoders<'_> {
    fn has(&self, number: usize) -> bool {
        self.components.has(&numbered("text_encoder", number))
    }

    fn tokenizer_length(&self, number: usize) -> clearform_models::Result<Option<usize>> {
        self.own_length(number).map_err(refused)
    }

    fn clip(&self, number: usize, prompts: &[String]) -> clearform_models::Result<ClipEncoded> {
        self.encode_clip(number, prompts).map_err(refused)
    }

    fn t5(&self, number: usize, prompts: &[String], tokens: usize) -> clearform_models::Result<Tensor> {
        let ids = self.t5_ids(number, prompts, tokens).map_err(refused)?;
        self.build_t5(number).map_err(refused)?.encode(&Tensor::new(ids, self.device)?)
    }

    /// What comes before the padding is encoded alone, which is to encode it behind a mask.
    fn t5_masked(
        &self,
        number: usize,
        prompts: &[String],
        tokens: usize,
    ) -> clearform_models::Result<(Tensor, Tensor)> {
        let ids = self.t5_ids(number, prompts, tokens).map_err(refused)?;
        let encoder = self.build_t5(number).map_err(refused)?;
        let (mut features, mut masks) = (Vec::new(), Vec::new());
        for ids in ids {
            let own = ids.iter().rposition(|id| *id != T5_PAD).map_or(1, |last| last + 1);
            let encoded = encoder.encode(&Tensor::new(&ids[..own], self.device)?.unsqueeze(0)?)?;
            features.push(encoded.pad_with_zeros(1, 0, tokens - own)?);
            let mask = (0..tokens).map(|token| f32::from(token < own));
            masks.push(Tensor::from_iter(mask, self.device)?.unsqueeze(0)?);
        }
        Ok((Tensor::cat(&features, 0)?, Tensor::cat(&masks, 0)?))
    }
}

/// The id that every T5 pads with.
const T5_PAD: u32 = 0;

impl PipelineTextEncoders<'_> {
    fn encode_clip(&self, number: usize, prompts: &[String]) -> Result<ClipEncoded> {
        let part = numbered("text_encoder", number);
        let config = ClipConfig::new(&self.components.config(&part)?)?;
        let tokenizer = self.clip_tokenizer(&numbered("tokenizer", number))?;
        let length = tokenizer.max_length().unwrap_or(usize::MAX).min(config.max_tokens());
        let ids = prompts.iter().map(|prompt| tokenizer.encode(prompt, length));
        let ids = ids.collect::<clearform_models::Result<Vec<_>>>()?;
        let encoder = ClipText::build(config, self.weights(&part)?.as_ref())?;
        Ok(encoder.encode(&Tensor::new(ids, self.device)?)?)
    }

    fn t5_ids(&self, number: usize, prompts: &[String], tokens: usize) -> Result<Vec<Vec<u32>>> {
        let tokenizer = self.t5_tokenizer(&numbered("tokenizer", number))?;
        let ids = prompts.iter().map(|prompt| tokenizer.encode(prompt, tokens));
        Ok(ids.collect::<clearform_models::Result<_>>()?)
    }

    fn build_t5(&self, number: usize) -> Result<T5Encoder> {
        let part = numbered("text_encoder", number);
        let config = T5Config::new(&self.components.config(&part)?)?;
        Ok(T5Encoder::build(config, self.weights(&part)?.as_ref())?)
    }

    fn weights(&self, part: &str) -> Result<Box<dyn TensorSource + '_>> {
        open_weights(self.components, part, self.edits, self.device)
    }

    /// Older libraries write vocab.json and merges.txt, newer ones tokenizer.json.
    fn clip_tokenizer(&self, part: &str) -> Result<ClipTokenizer> {
        let bytes = |file| self.components.bytes(part, file);
        let settings = bytes(TOKENIZER_CONFIG)?;
        Ok(match (bytes("vocab.json")?, bytes("merges.txt")?) {
            (Some(vocab), Some(merges)) => ClipTokenizer::from_vocabulary(&vocab, &merges, settings.as_deref())?,
            _ => ClipTokenizer::from_json(&self.required(part, TOKENIZER)?, settings.as_deref())?,
        })
    }

    /// Older libraries write spiece.model alone.
    fn t5_tokenizer(&self, part: &str) -> Result<T5Tokenizer> {
        let bytes = |file| self.components.bytes(part, file);
        Ok(match (bytes(TOKENIZER)?, bytes("spiece.model")?) {
            (None, Some(model)) => T5Tokenizer::from_sentencepiece(&model, bytes(TOKENIZER_CONFIG)?.as_deref())?,
            _ => T5Tokenizer::from_json(&self.required(part, TOKENIZER)?)?,
        })
    }

    fn own_length(&self, number: usize) -> Result<Option<usize>> {
        let part = numbered("tokenizer", number);
        let Some(_) = self.components.bytes(&part, TOKENIZER_CONFIG)? else { return Ok(None) };
        let length = self.components.json(&part, TOKENIZER_CONFIG)?["model_max_length"].as_u64();
        Ok(length.map(|length| length as usize))
    }

    fn required(&self, part: &str, file: &str) -> Result<Vec<u8>> {
        let found = self.components.bytes(part, file)?;
        found.map_or_else(
            || {
                let reason =
                    format!("{file} is missing. Save the tokenizer with transformers 4.30 or newer, or copy the file");
                Err(RuntimeError::BadComponent { path: self.components.folder(part)?, reason })
            },
            Ok,
        )
    }
}

/// The folder of part `name` that has this number.
fn numbered(name: &str, number: usize) -> String {
    if number == 1 { name.to_owned() } else { format!("{name}_{number}") }
}

fn refused(error: RuntimeError) -> ModelError {
    match error {
        RuntimeError::Model(error) => error,
        other => ModelError::Encoder(Box::new(other)),
    }
}
