//! [`ClipText`]: CLIP's text encoder (Radford et al., 2021), over candle-transformers. It takes token ids, not text.

use super::{checked_ids, f32_weights};
use crate::keys::{Keys, bad};
use crate::{ModelError, Result};
use candle_core::Tensor;
use candle_transformers::models::clip::text_model::{Activation, ClipTextConfig, ClipTextTransformer};
use clearform_weights::TensorSource;
use serde_json::Value;

/// Layer norm's constant, the only one the encoder has.
const NORM_EPS: f64 = 1e-5;
/// Configs written before transformers 4.31 hold this id for the end token, which no vocabulary bears out.
const LEGACY_END: u32 = 2;

/// Sizes of a CLIP text encoder, from its config.json.
#[derive(Debug, Clone)]
pub struct ClipConfig {
    sizes: ClipTextConfig,
    end_token: u32,
}

/// CLIP's text encoder.
#[derive(Debug)]
pub struct ClipText {
    model: ClipTextTransformer,
    config: ClipConfig,
}

/// What CLIP makes of token ids.
#[derive(Debug, Clone)]
pub struct ClipEncoded {
    /// Every token, after the last layer norm: (batch, tokens, channels) in f32.
    pub hidden: Tensor,
    /// The end token alone: (batch, channels) in f32.
    pub pooled: Tensor,
}

impl ClipConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// A key of the wrong type, or an activation that only other encoders have.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = Keys::new(config)?;
        let activation = keys.text("hidden_act", "quick_gelu")?;
        if activation != "quick_gelu" {
            return Err(bad("hidden_act", format!("{activation:?} is not supported, only \"quick_gelu\"")));
        }
        let eps = keys.number("layer_norm_eps", NORM_EPS)?;
        if eps != NORM_EPS {
            return Err(bad("layer_norm_eps", format!("{eps} is not supported, only {NORM_EPS}")));
        }
        Ok(Self { sizes: sizes(keys)?, end_token: keys.count("eos_token_id", 49407)? as u32 })
    }

    /// The longest sequence the encoder has positions for.
    pub fn max_tokens(&self) -> usize {
        self.sizes.max_position_embeddings
    }
}

impl ClipText {
    /// Builds the encoder from `source`, whose names may or may not begin with "text_model.".
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: ClipConfig, source: &dyn TensorSource) -> Result<Self> {
        let weights = f32_weights(source, |name| name.strip_prefix("text_model.").unwrap_or(name).to_owned())?;
        Ok(Self { model: ClipTextTransformer::new(weights, &config.sizes)?, config })
    }

    /// Encodes token ids.
    ///
    /// # Shapes
    /// ids (batch, tokens) of integers.
    ///
    /// # Errors
    /// Ids beyond the vocabulary, or more tokens than there are positions.
    pub fn encode(&self, ids: &Tensor) -> Result<ClipEncoded> {
        let ids = checked_ids(ids, self.config.sizes.vocab_size)?;
        let (tokens, positions) = (ids.dim(1)?, self.config.max_tokens());
        if tokens > positions {
            let reason = format!("{tokens} tokens, but the encoder has positions for {positions}");
            return Err(ModelError::bad_input("ids", reason));
        }
        let hidden = self.model.forward_with_mask(&ids, usize::MAX)?;
        let mut pooled = Vec::new();
        for (row, ids) in ids.to_vec2::<u32>()?.iter().enumerate() {
            pooled.push(hidden.get(row)?.get(end_position(ids, self.config.end_token))?);
        }
        Ok(ClipEncoded { pooled: Tensor::stack(&pooled, 0)?, hidden })
    }
}

fn sizes(keys: Keys) -> Result<ClipTextConfig> {
    let width = keys.count("hidden_size", 512)?;
    let heads = keys.count("num_attention_heads", 8)?;
    if heads == 0 || width % heads != 0 {
        return Err(bad("num_attention_heads", format!("expected a divisor of hidden_size = {width}, found {heads}")));
    }
    Ok(ClipTextConfig {
        vocab_size: keys.count("vocab_size", 49408)?,
        embed_dim: width,
        activation: Activation::QuickGelu,
        intermediate_size: keys.count("intermediate_size", 2048)?,
        max_position_embeddings: keys.count("max_position_embeddings", 77)?,
        pad_with: None,
        num_hidden_layers: keys.count("num_hidden_layers", 12)?,
        num_attention_heads: heads,
        projection_dim: keys.count("projection_dim", 512)?,
    })
}

/// Where the end token stands: the first one, or, for configs that do not know its id, the first highest id.
fn end_position(ids: &[u32], end_token: u32) -> usize {
    let highest = ids.iter().copied().max().unwrap_or(0);
    let sought = if end_token == LEGACY_END { highest } else { end_token };
    ids.iter().position(|id| *id == sought).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pooling_takes_the_first_end_token() {
        let cases = [
            (&[7, 3, 9, 9][..], 9, 2),
            (&[7, 9, 12, 9][..], 9, 1),
            (&[7, 9, 12, 12][..], LEGACY_END, 2),
            (&[7, 3, 4][..], 9, 0),
        ];
        for (ids, end_token, expected) in cases {
            assert_eq!(end_position(ids, end_token), expected, "{ids:?}");
        }
    }

    #[test]
    fn what_only_other_encoders_have_is_an_error() {
        for (config, expected) in [
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"layer_norm_eps": 1e-6}), "layer_norm_eps"),
            (json!({"hidden_size": 10, "num_attention_heads": 3}), "divisor of hidden_size = 10"),
        ] {
            let error = ClipConfig::new(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
