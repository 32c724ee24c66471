//! [`T5Encoder`]: the encoder of T5 (Raffel et al., arXiv 1910.10683), from candle-transformers. It follows
//! transformers' `T5EncoderModel` without an attention mask: to mask padding, encode prompts without it.

use super::checked_ids;
use crate::Result;
use crate::config_keys::{ConfigKeys, bad};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::t5::{self, ActivationWithOptionalGating, T5EncoderModel};
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::HashMap;

/// Sizes of a T5 encoder, from its config.json (transformers' `T5Config`).
#[derive(Debug, Clone)]
pub struct T5Config(t5::Config);

/// The encoder of T5, transformers' `T5EncoderModel`.
#[derive(Debug)]
pub struct T5Encoder {
    model: T5EncoderModel,
    vocabulary: usize,
}

impl T5Config {
    /// Reads config.json. Absent keys have the defaults of transformers' `T5Config`.
    ///
    /// # Errors
    /// A key of the wrong type, or an activation that is not supported.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let buckets = keys.count("relative_attention_num_buckets", 32)?;
        let distance = keys.count("relative_attention_max_distance", 128)?;
        if buckets < 4 || distance <= buckets / 4 {
            let reason =
                format!("expected 4 or more, and less than 4 relative_attention_max_distance; found {buckets}");
            return Err(bad("relative_attention_num_buckets", reason));
        }
        Ok(Self(t5::Config {
            vocab_size: keys.count("vocab_size", 32128)?,
            d_model: keys.count("d_model", 512)?,
            d_kv: keys.count("d_kv", 64)?,
            d_ff: keys.count("d_ff", 2048)?,
            num_layers: keys.count("num_layers", 6)?,
            num_heads: keys.count("num_heads", 8)?,
            relative_attention_num_buckets: buckets,
            relative_attention_max_distance: distance,
            layer_norm_epsilon: keys.number("layer_norm_epsilon", 1e-6)?,
            feed_forward_proj: feed_forward(keys.text("feed_forward_proj", "relu")?)?,
            ..t5::Config::default()
        }))
    }
}

impl T5Encoder {
    /// Builds the encoder from `source`. The token embedding may be called "shared.weight",
    /// "encoder.embed_tokens.weight" or both.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: T5Config, source: &dyn TensorSource) -> Result<Self> {
        let model = T5EncoderModel::load(f32_weights(source)?, &config.0)?;
        Ok(Self { model, vocabulary: config.0.vocab_size })
    }

    /// Encodes token ids.
    ///
    /// # Shapes
    /// ids (batch, tokens) of any integer type -> (batch, tokens, channels) in f32.
    ///
    /// # Errors
    /// Ids beyond the vocabulary.
    pub fn encode(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = checked_ids(ids, self.vocabulary)?;
        // `forward` takes the model mutably because decoders have a cache. A clone shares all weights.
        Ok(self.model.clone().forward(&ids)?)
    }
}

/// Every tensor of `source` in f32. Tensors are converted one at a time, so that the bf16 and f32 weights of an encoder
/// are never in memory together.
fn f32_weights(source: &dyn TensorSource) -> Result<VarBuilder<'static>> {
    let mut tensors = HashMap::new();
    let mut device = Device::Cpu;
    for info in source.tensors() {
        let tensor = source.tensor(&info.name)?.to_dtype(DType::F32)?;
        device = tensor.device().clone();
        tensors.insert(info.name, tensor);
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &device))
}

/// The activation that config.json calls `name`.
fn feed_forward(name: &str) -> Result<ActivationWithOptionalGating> {
    let (gated, activation) = match name {
        "relu" => (false, Activation::Relu),
        "gated-gelu" => (true, Activation::NewGelu),
        "gated-silu" => (true, Activation::Silu),
        _ => {
            let known = "relu, gated-gelu and gated-silu";
            return Err(bad("feed_forward_proj", format!("{name:?} is not supported, only {known}")));
        }
    };
    Ok(ActivationWithOptionalGating { gated, activation })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn unknown_activations_are_errors() {
        let error = T5Config::new(&json!({"feed_forward_proj": "gelu"})).unwrap_err().to_string();
        assert!(error.contains("\"feed_forward_proj\": \"gelu\" is not supported"), "{error}");
        let error = T5Config::new(&json!({"relative_attention_num_buckets": 2})).unwrap_err().to_string();
        assert!(error.contains("\"relative_attention_num_buckets\": expected 4 or more"), "{error}");
    }
}
