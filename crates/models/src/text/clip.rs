//! [`ClipText`]: CLIP's text encoder (Radford et al., arXiv 2103.00020). It follows transformers' `CLIPTextModel` and
//! `CLIPTextModelWithProjection`.

use super::checked_ids;
use crate::config_keys::{ConfigKeys, bad};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{ModelError, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{LayerNorm, Module as _, ops};
use clearform_weights::TensorSource;
use serde_json::Value;

/// The `eos_token_id` in configs written before transformers 4.31. It is wrong for every vocabulary; transformers then
/// pools at the highest id.
const LEGACY_END: u32 = 2;

/// Sizes of a CLIP text encoder, from its config.json (transformers' `CLIPTextConfig`).
#[derive(Debug, Clone)]
pub struct ClipConfig {
    vocabulary: usize,
    width: usize,
    layers: usize,
    heads: usize,
    max_tokens: usize,
    activation: Activation,
    norm_eps: f64,
    end_token: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activation {
    Gelu,
    QuickGelu,
}

/// CLIP's text encoder, with the projection to the joint text-image space if it has one.
pub struct ClipText {
    config: ClipConfig,
    tokens: Tensor,
    positions: Tensor,
    layers: Vec<ClipLayer>,
    final_norm: LayerNorm,
    projection: Option<Linear>,
}

/// Outputs of [`ClipText::encode`].
#[derive(Debug, Clone)]
pub struct ClipEncoded {
    /// `last_hidden_state`: hidden states after the final norm, (batch, tokens, channels).
    pub hidden: Tensor,
    /// `hidden_states[-2]`: the input of the last layer, (batch, tokens, channels).
    pub penultimate: Tensor,
    /// `pooler_output`: the hidden state of the end token, (batch, channels).
    pub pooled: Tensor,
    /// `text_embeds`: the projection of `pooled`, (batch, projection channels), of a `CLIPTextModelWithProjection`.
    pub projected: Option<Tensor>,
}

impl ClipConfig {
    /// Reads config.json of CLIPTextModel or CLIPTextModelWithProjection.
    ///
    /// # Errors
    /// A key of the wrong type, or an activation that is not supported.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let activation = match keys.text("hidden_act", "quick_gelu")? {
            "gelu" => Activation::Gelu,
            "quick_gelu" => Activation::QuickGelu,
            other => {
                let reason = format!("{other:?} is not supported, only \"quick_gelu\" and \"gelu\"");
                return Err(bad("hidden_act", reason));
            }
        };
        let width = keys.count("hidden_size", 512)?;
        let heads = keys.count("num_attention_heads", 8)?;
        if heads == 0 || width % heads != 0 {
            let reason = format!("expected a divisor of hidden_size = {width}, found {heads}");
            return Err(bad("num_attention_heads", reason));
        }
        Ok(Self {
            vocabulary: keys.count("vocab_size", 49408)?,
            width,
            layers: keys.count("num_hidden_layers", 12)?,
            heads,
            max_tokens: keys.count("max_position_embeddings", 77)?,
            activation,
            norm_eps: keys.number("layer_norm_eps", 1e-5)?,
            end_token: keys.count("eos_token_id", 49407)? as u32,
        })
    }

    /// Maximum number of tokens (`max_position_embeddings`).
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }
}

impl ClipText {
    /// Builds the encoder from `source`. Names may or may not start with "text_model.".
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: ClipConfig, source: &dyn TensorSource) -> Result<Self> {
        let root = WeightBuilder::root(source).in_dtype(DType::F32);
        let prefixed = root.has("text_model.embeddings.token_embedding.weight");
        let builder = if prefixed { root.pp("text_model") } else { root.clone() };
        let table = builder.pp("embeddings");
        let width = config.width;
        let layer = |index| ClipLayer::load(&builder.pp(format!("encoder.layers.{index}")), &config);
        let projects = root.has("text_projection.weight");
        Ok(Self {
            tokens: table.shaped("token_embedding.weight", &[config.vocabulary, width])?,
            positions: table.shaped("position_embedding.weight", &[config.max_tokens, width])?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            final_norm: layer_norm(&builder.pp("final_layer_norm"), config.norm_eps)?,
            projection: if projects { Some(root.linear("text_projection")?) } else { None },
            config,
        })
    }

    /// Encodes token ids.
    ///
    /// # Shapes
    /// ids (batch, tokens) of any integer type; see [`ClipEncoded`].
    ///
    /// # Errors
    /// Ids outside the vocabulary, or more tokens than [`ClipConfig::max_tokens`].
    pub fn encode(&self, ids: &Tensor) -> Result<ClipEncoded> {
        let ids = checked_ids(ids, self.config.vocabulary)?;
        let (batch, tokens) = ids.dims2()?;
        if tokens > self.config.max_tokens {
            let reason = format!("expected at most {} tokens, found {tokens}", self.config.max_tokens);
            return Err(ModelError::bad_input("ids", reason));
        }
        let embedded = self.tokens.index_select(&ids.flatten_all()?, 0)?.reshape((batch, tokens, ()))?;
        let mut x = embedded.broadcast_add(&self.positions.narrow(0, 0, tokens)?)?;
        let mut penultimate = x.clone();
        let mask = causal_mask(tokens, x.device())?;
        for layer in &self.layers {
            penultimate = x.clone();
            x = layer.forward(&x, &mask)?;
        }
        let hidden = self.final_norm.forward(&x)?;
        let pooled = self.pool(&hidden, &ids)?;
        let projected = self.projection.as_ref().map(|projection| projection.forward(&pooled)).transpose()?;
        Ok(ClipEncoded { hidden, penultimate, pooled, projected })
    }

    /// # Shapes
    /// hidden (batch, tokens, channels), ids (batch, tokens) -> (batch, channels).
    fn pool(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let mut pooled = Vec::new();
        for (row, ids) in ids.to_vec2::<u32>()?.iter().enumerate() {
            pooled.push(hidden.get(row)?.get(end_position(ids, self.config.end_token))?);
        }
        Ok(Tensor::stack(&pooled, 0)?)
    }
}

/// transformers' `CLIPEncoderLayer`: causal self-attention, then an MLP, each after a layer norm.
struct ClipLayer {
    norms: [LayerNorm; 2],
    projections: [Linear; 3],
    out: Linear,
    up: Linear,
    down: Linear,
    heads: usize,
    activation: Activation,
}

impl ClipLayer {
    fn load(builder: &WeightBuilder, config: &ClipConfig) -> Result<Self> {
        let attention = builder.pp("self_attn");
        let mlp = builder.pp("mlp");
        let norm = |name: &str| layer_norm(&builder.pp(name), config.norm_eps);
        Ok(Self {
            norms: [norm("layer_norm1")?, norm("layer_norm2")?],
            projections: [attention.linear("q_proj")?, attention.linear("k_proj")?, attention.linear("v_proj")?],
            out: attention.linear("out_proj")?,
            up: mlp.linear("fc1")?,
            down: mlp.linear("fc2")?,
            heads: config.heads,
            activation: config.activation,
        })
    }

    /// # Shapes
    /// x (batch, tokens, width), mask (tokens, tokens) -> as x.
    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attend(&self.norms[0].forward(x)?, mask)?)?;
        let up = self.up.forward(&self.norms[1].forward(&x)?)?;
        let active = match self.activation {
            Activation::Gelu => up.gelu_erf()?,
            Activation::QuickGelu => (&up * ops::sigmoid(&(&up * 1.702)?)?)?,
        };
        Ok((x + self.down.forward(&active)?)?)
    }

    fn attend(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let head_dim = width / self.heads;
        let by_head = |linear: &Linear| -> Result<Tensor> {
            let heads = linear.forward(x)?.reshape((batch, tokens, self.heads, head_dim))?;
            Ok(heads.transpose(1, 2)?.contiguous()?) // (batch, heads, tokens, head_dim)
        };
        let [query, key, value] = &self.projections;
        let query = (by_head(query)? * (head_dim as f64).powf(-0.5))?;
        let scores = query.matmul(&by_head(key)?.t()?)?.broadcast_add(mask)?;
        let attended = ops::softmax_last_dim(&scores)?.matmul(&by_head(value)?)?;
        Ok(self.out.forward(&attended.transpose(1, 2)?.reshape((batch, tokens, width))?)?)
    }
}

fn layer_norm(builder: &WeightBuilder, eps: f64) -> Result<LayerNorm> {
    Ok(LayerNorm::new(builder.tensor("weight")?, builder.tensor("bias")?, eps))
}

/// 0 where a token (row) attends to another (column), minus infinity elsewhere.
///
/// # Shapes
/// The result is (tokens, tokens).
fn causal_mask(tokens: usize, device: &Device) -> Result<Tensor> {
    let value = |index: usize| if index % tokens > index / tokens { f32::NEG_INFINITY } else { 0.0 };
    Ok(Tensor::from_iter((0..tokens * tokens).map(value), device)?.reshape((tokens, tokens))?)
}

/// Position of the first end token, or of the first highest id if the config has [`LEGACY_END`].
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
    fn unsupported_configs_are_errors() {
        for (config, expected) in [
            (json!({"hidden_act": "relu"}), "hidden_act"),
            (json!({"hidden_size": 10, "num_attention_heads": 3}), "divisor of hidden_size = 10"),
        ] {
            let error = ClipConfig::new(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
