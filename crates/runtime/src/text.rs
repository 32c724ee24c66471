//! Prompts to conditions, as FluxPipeline encodes them: pooled CLIP and the sequence of T5. Each encoder is loaded,
//! used and released before the next.

use crate::{Components, Result, RuntimeError};
use candle_core::{DType, Device, Tensor};
use clearform_models::Conditions;
use clearform_models::text::{ClipConfig, ClipText, ClipTokenizer, T5Config, T5Encoder, T5Tokenizer};
use clearform_plugins::{Adapted, Changes, LowRankMode};
use clearform_weights::{Checkpoint, Resident, TensorSource};

/// FluxPipeline's `max_sequence_length`.
const MAX_T5_TOKENS: usize = 512;
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Encodes `prompts`, in f32.
///
/// # Shapes
/// text (prompts, text tokens, channels), pooled (prompts, channels), text_ids (text tokens, 3).
pub(crate) fn encode_prompts(
    components: &Components,
    prompts: &[String],
    changes: &Changes,
    device: &Device,
) -> Result<Conditions> {
    if prompts.is_empty() {
        return Err(RuntimeError::BadSetting("prompts: expected at least one, found none".to_owned()));
    }
    let pooled = encode_clip(components, prompts, changes, device)?;
    let text = encode_t5(components, prompts, changes, device)?;
    let text_ids = Tensor::zeros((text.dim(1)?, 3), DType::F32, device)?;
    Ok(Conditions { text: Some(text), pooled: Some(pooled), text_ids: Some(text_ids), ..Conditions::default() })
}

/// The weights of a part as adapters edit them, ready to be built from on `device`. These parts are built by others, who
/// add nothing beside a product.
pub(crate) fn open_weights<'a>(
    components: &Components,
    part: &str,
    changes: &'a Changes,
    device: &Device,
) -> Result<Box<dyn TensorSource + 'a>> {
    let checkpoint = Checkpoint::open(components.folder(part)?)?;
    Ok(match device {
        Device::Cpu => Box::new(Adapted::new(checkpoint, changes, part, LowRankMode::Fused)),
        _ => {
            let resident = Resident::load(&checkpoint, None, device)?;
            Box::new(Adapted::new(resident, changes, part, LowRankMode::Fused))
        }
    })
}

fn encode_clip(components: &Components, prompts: &[String], changes: &Changes, device: &Device) -> Result<Tensor> {
    let config = ClipConfig::new(&components.json("text_encoder", CONFIG)?)?;
    let tokenizer = clip_tokenizer(components)?;
    let length = tokenizer.max_length().unwrap_or(usize::MAX).min(config.max_tokens());
    let ids = token_ids(prompts, |prompt| tokenizer.encode(prompt, length), device)?;
    let encoder = ClipText::build(config, open_weights(components, "text_encoder", changes, device)?.as_ref())?;
    Ok(encoder.encode(&ids)?.pooled)
}

fn encode_t5(components: &Components, prompts: &[String], changes: &Changes, device: &Device) -> Result<Tensor> {
    let config = T5Config::new(&components.json("text_encoder_2", CONFIG)?)?;
    let file = required(components, "tokenizer_2", TOKENIZER)?;
    let (tokenizer, length) = (T5Tokenizer::from_json(&file)?, t5_length(components)?);
    let ids = token_ids(prompts, |prompt| tokenizer.encode(prompt, length), device)?;
    let encoder = T5Encoder::build(config, open_weights(components, "text_encoder_2", changes, device)?.as_ref())?;
    Ok(encoder.encode(&ids)?)
}

/// Older libraries write vocab.json and merges.txt, newer ones tokenizer.json.
fn clip_tokenizer(components: &Components) -> Result<ClipTokenizer> {
    let bytes = |file| components.bytes("tokenizer", file);
    let settings = bytes(TOKENIZER_CONFIG)?;
    Ok(match (bytes("vocab.json")?, bytes("merges.txt")?) {
        (Some(vocab), Some(merges)) => ClipTokenizer::from_vocabulary(&vocab, &merges, settings.as_deref())?,
        _ => ClipTokenizer::from_json(&required(components, "tokenizer", TOKENIZER)?, settings.as_deref())?,
    })
}

/// The tokenizer's own length, where it is shorter than the pipeline's.
fn t5_length(components: &Components) -> Result<usize> {
    let Some(_) = components.bytes("tokenizer_2", TOKENIZER_CONFIG)? else { return Ok(MAX_T5_TOKENS) };
    let own = components.json("tokenizer_2", TOKENIZER_CONFIG)?["model_max_length"].as_u64();
    Ok(own.map_or(MAX_T5_TOKENS, |length| MAX_T5_TOKENS.min(length as usize)))
}

fn required(components: &Components, name: &'static str, file: &str) -> Result<Vec<u8>> {
    let found = components.bytes(name, file)?;
    found.map_or_else(
        || {
            let reason =
                format!("{file} is missing. Save the tokenizer with transformers 4.30 or newer, or copy the file");
            Err(RuntimeError::BadComponent { path: components.folder(name)?, reason })
        },
        Ok,
    )
}

/// # Shapes
/// The result is (prompts, tokens).
fn token_ids(
    prompts: &[String],
    encode: impl Fn(&str) -> clearform_models::Result<Vec<u32>>,
    device: &Device,
) -> Result<Tensor> {
    let ids = prompts.iter().map(|prompt| encode(prompt)).collect::<clearform_models::Result<Vec<_>>>()?;
    Ok(Tensor::new(ids, device)?)
}
