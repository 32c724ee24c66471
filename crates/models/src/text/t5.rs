//! [`T5Encoder`]: the encoder of T5 (Raffel et al., arXiv 1910.10683). It follows transformers' `T5EncoderModel`, and
//! `UMT5EncoderModel`, whose blocks each have a table of relative positions.

mod block;
mod relative_position;

use super::checked_ids;
use crate::Result;
use crate::config_keys::{ConfigKeys, bad};
use crate::layers::{Blocks, TokenEmbedding, expect};
use crate::weight_builder::WeightBuilder;
use block::{ScoreBias, T5Block, T5LayerNorm};
use candle_core::{DType, Tensor};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use relative_position::RelativePositions;
use serde_json::Value;

/// The token embedding, and its other name in transformers.
const EMBEDDING: &str = "shared.weight";
const TIED_EMBEDDING: &str = "encoder.embed_tokens.weight";

/// Tokens that are encoded at a time, in whole prompts. Bounds the activations: a layer of T5-XXL's MLP has 84 MB of
/// them in f32. Enough that converting the weights for each part costs little beside their products.
const TOKENS_AT_ONCE: usize = 2048;

/// Sizes of a T5 encoder, from its config.json (transformers' `T5Config`).
#[derive(Debug, Clone)]
pub struct T5Config {
    vocabulary: usize,
    width: usize,
    inner_width: usize,
    heads: usize,
    head_dim: usize,
    blocks: usize,
    buckets: usize,
    max_distance: usize,
    norm_eps: f64,
    feed_forward: T5FeedForwardKind,
}

/// `feed_forward_proj`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct T5FeedForwardKind {
    gated: bool,
    activation: T5Activation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum T5Activation {
    Relu,
    /// GELU in its tanh approximation (transformers' "gelu_new").
    GeluNew,
    Silu,
}

/// The encoder of T5, transformers' `T5EncoderModel`. It computes in f32; weights stay in memory as they are stored, or
/// the blocks are streamed.
pub struct T5Encoder {
    config: T5Config,
    /// (vocabulary, width).
    embedding: TokenEmbedding,
    /// Those of the first block.
    positions: RelativePositions,
    blocks: Blocks<T5Block>,
    final_norm: T5LayerNorm,
}

impl T5Config {
    /// Reads config.json. Absent keys have the defaults of transformers' `T5Config`.
    ///
    /// # Errors
    /// A key of the wrong type, a size of 0, or an activation that is not supported.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let size = |key: &str, default: usize| match keys.count(key, default)? {
            0 => Err(bad(key, "expected at least 1, found 0")),
            size => Ok(size),
        };
        let buckets = keys.count("relative_attention_num_buckets", 32)?;
        let max_distance = keys.count("relative_attention_max_distance", 128)?;
        if buckets < 4 || max_distance <= buckets / 4 {
            let reason =
                format!("expected 4 or more, and less than 4 relative_attention_max_distance; found {buckets}");
            return Err(bad("relative_attention_num_buckets", reason));
        }
        Ok(Self {
            vocabulary: keys.count("vocab_size", 32128)?,
            width: size("d_model", 512)?,
            inner_width: size("d_ff", 2048)?,
            heads: size("num_heads", 8)?,
            head_dim: size("d_kv", 64)?,
            blocks: size("num_layers", 6)?,
            buckets,
            max_distance,
            norm_eps: keys.number("layer_norm_epsilon", 1e-6)?,
            feed_forward: T5FeedForwardKind::new(keys.text("feed_forward_proj", "relu")?)?,
        })
    }
}

impl T5FeedForwardKind {
    /// What config.json calls `name`.
    fn new(name: &str) -> Result<Self> {
        let (gated, activation) = match name {
            "relu" => (false, T5Activation::Relu),
            "gated-gelu" => (true, T5Activation::GeluNew),
            "gated-silu" => (true, T5Activation::Silu),
            _ => {
                let known = "relu, gated-gelu and gated-silu";
                return Err(bad("feed_forward_proj", format!("{name:?} is not supported, only {known}")));
            }
        };
        Ok(Self { gated, activation })
    }
}

impl T5Encoder {
    /// Builds the encoder from `source`. The token embedding may be called "shared.weight",
    /// "encoder.embed_tokens.weight" or both.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: T5Config, source: &dyn TensorSource) -> Result<Self> {
        let root = WeightBuilder::root(source);
        let encoder = root.pp("encoder");
        let is_tied = !root.has(EMBEDDING) && root.has(TIED_EMBEDDING);
        let embedding = if is_tied { TIED_EMBEDDING } else { EMBEDDING };
        Ok(Self {
            embedding: TokenEmbedding::load(&root, embedding, [config.vocabulary, config.width])?,
            positions: RelativePositions::load(&encoder.pp("block.0.layer.0.SelfAttention"), &config)?,
            blocks: Blocks::load(config.blocks, &config, source, &AttentionPlan::full())?,
            final_norm: T5LayerNorm::load(&encoder.pp("final_layer_norm"), &config)?,
            config,
        })
    }

    /// Encodes token ids. Tokens whose `mask` is 0 are not attended to; their own encodings mean nothing.
    ///
    /// # Shapes
    /// ids (batch, tokens) of any integer type, mask (batch, tokens) of 1 for tokens and 0 for padding -> (batch,
    /// tokens, channels) in f32.
    ///
    /// # Errors
    /// Ids beyond the vocabulary, or a mask of another shape than the ids.
    pub fn encode(&self, ids: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let ids = checked_ids(ids, self.config.vocabulary)?;
        let (batch, tokens) = ids.dims2()?;
        let mask = mask.map(|mask| additive_mask(mask, batch, tokens)).transpose()?;
        let prompts_at_once = (TOKENS_AT_ONCE / tokens).max(1);
        let mut encoded = Vec::new();
        for first in (0..batch).step_by(prompts_at_once) {
            let count = prompts_at_once.min(batch - first);
            let mask = mask.as_ref().map(|mask| mask.narrow(0, first, count)).transpose()?;
            encoded.push(self.encode_part(&ids.narrow(0, first, count)?, mask)?);
        }
        Ok(Tensor::cat(&encoded, 0)?)
    }

    fn encode_part(&self, ids: &Tensor, mask: Option<Tensor>) -> Result<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        let embedded = self.embedding.rows(&ids.flatten_all()?)?;
        let mut x = embedded.reshape((batch, tokens, ()))?;
        let mut bias = ScoreBias { positions: self.positions.bias(tokens)?, mask };
        for index in 0..self.config.blocks {
            let block = self.blocks.get(index)?;
            if let Some(positions) = block.positions() {
                bias.positions = positions.bias(tokens)?;
            }
            x = block.forward(&x, &bias)?;
        }
        self.final_norm.forward(&x)
    }
}

/// (1 - mask) times the lowest number, as transformers adds to scores.
///
/// # Shapes
/// mask (batch, tokens) -> (batch, 1, tokens) in f32.
fn additive_mask(mask: &Tensor, batch: usize, tokens: usize) -> Result<Tensor> {
    expect("attention_mask", mask, &[Some(batch), Some(tokens)])?;
    let lowest = f64::from(f32::MIN);
    Ok(mask.to_dtype(DType::F32)?.affine(-lowest, lowest)?.unsqueeze(1)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;
    use clearform_weights::InMemoryTensors;
    use serde_json::json;

    const POSITIONS: &str = "layer.0.SelfAttention.relative_attention_bias.weight";

    fn config() -> T5Config {
        let sizes = json!({"vocab_size": 11, "d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 2});
        T5Config::new(&sizes).unwrap()
    }

    fn values(shape: &[usize], seed: usize) -> Tensor {
        let value = |index: usize| ((index * 7919 + seed * 104_729) as f32 * 0.618).sin();
        Tensor::from_iter((0..shape.iter().product()).map(value), &Device::Cpu).unwrap().reshape(shape).unwrap()
    }

    fn weights() -> InMemoryTensors {
        let attention = ["q", "k", "v", "o"].map(|name| (format!("layer.0.SelfAttention.{name}.weight"), vec![8, 8]));
        let mlp = [("wi", [12, 8]), ("wo", [8, 12])]
            .map(|(name, shape)| (format!("layer.1.DenseReluDense.{name}.weight"), shape.to_vec()));
        let norms = [0, 1].map(|layer| (format!("layer.{layer}.layer_norm.weight"), vec![8]));
        let parameters: Vec<_> = attention.into_iter().chain(mlp).chain(norms).collect();
        let in_block = |block: usize| {
            let named = parameters.iter().map(move |(name, shape)| (format!("encoder.block.{block}.{name}"), shape));
            named.map(|(name, shape)| (name, shape.clone()))
        };
        let others = [(EMBEDDING, vec![11, 8]), ("encoder.final_layer_norm.weight", vec![8])];
        let shapes = in_block(0).chain(in_block(1)).chain(others.map(|(name, shape)| (name.to_owned(), shape)));
        let mut weights: InMemoryTensors =
            shapes.enumerate().map(|(seed, (name, shape))| (name, values(&shape, seed))).collect();
        weights.insert(format!("encoder.block.0.{POSITIONS}"), values(&[32, 2], 99));
        weights
    }

    fn encoder(weights: &InMemoryTensors) -> T5Encoder {
        T5Encoder::build(config(), weights).unwrap()
    }

    fn ids(prompts: &[Vec<u32>]) -> Tensor {
        Tensor::new(prompts.to_vec(), &Device::Cpu).unwrap()
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn masked_padding_changes_nothing() {
        let encoder = encoder(&weights());
        let alone = encoder.encode(&ids(&[vec![5, 2]]), None).unwrap();
        let padded = ids(&[vec![3, 1, 4], vec![5, 2, 0]]);
        let mask = ids(&[vec![1, 1, 1], vec![1, 1, 0]]);
        let prompt = |encoded: Tensor| encoded.narrow(0, 1, 1).unwrap().narrow(1, 0, 2).unwrap();
        assert!(largest_difference(&prompt(encoder.encode(&padded, Some(&mask)).unwrap()), &alone) < 1e-5);
        assert!(largest_difference(&prompt(encoder.encode(&padded, None).unwrap()), &alone) > 1e-2);
        let error = encoder.encode(&padded, Some(&mask.narrow(1, 0, 2).unwrap())).unwrap_err().to_string();
        assert!(error.contains("\"attention_mask\": expected shape (2, 3), found [2, 2]"), "{error}");
    }

    /// 2100 tokens take two parts of the batch, and each of the two heads is a part of its own.
    #[test]
    fn encoding_in_parts_changes_nothing() {
        let encoder = encoder(&weights());
        let prompts = [vec![3, 1, 4], vec![1, 5, 9]];
        let padded = prompts.clone().map(|mut prompt| {
            prompt.resize(2100, 0);
            prompt
        });
        let mask: Vec<u32> = (0..2100).map(|token| u32::from(token < 3)).collect();
        let encoded = encoder.encode(&ids(&padded), Some(&ids(&[mask.clone(), mask]))).unwrap();
        let alone = encoder.encode(&ids(&prompts), None).unwrap();
        assert!(largest_difference(&encoded.narrow(1, 0, 3).unwrap(), &alone) < 1e-5);
    }

    #[test]
    fn a_later_block_may_have_positions_of_its_own() {
        let prompt = ids(&[vec![3, 1, 4]]);
        let mut weights = weights();
        let shared = encoder(&weights).encode(&prompt, None).unwrap();
        let name = format!("encoder.block.1.{POSITIONS}");
        weights.insert(name.clone(), values(&[32, 2], 99));
        assert_eq!(largest_difference(&encoder(&weights).encode(&prompt, None).unwrap(), &shared), 0.0);
        weights.insert(name, values(&[32, 2], 7));
        assert!(largest_difference(&encoder(&weights).encode(&prompt, None).unwrap(), &shared) > 1e-3);
    }

    #[test]
    fn weights_in_bf16_give_what_their_values_give_in_f32() {
        let prompt = ids(&[(0..10).collect()]);
        let in_bf16 = InMemoryTensors::load(&weights(), Some(DType::BF16), &Device::Cpu).unwrap();
        let widened = InMemoryTensors::load(&in_bf16, Some(DType::F32), &Device::Cpu).unwrap();
        let [got, want] = [in_bf16, widened].map(|weights| encoder(&weights).encode(&prompt, None).unwrap());
        assert_eq!(got.dtype(), DType::F32);
        assert!(largest_difference(&got, &want) < 1e-6);
    }

    #[test]
    fn a_bad_tensor_is_named() {
        let name = "encoder.block.1.layer.1.DenseReluDense.wo.weight";
        let mut weights = weights();
        weights.insert(name, values(&[8, 11], 0));
        let error = T5Encoder::build(config(), &weights).map(drop).unwrap_err().to_string();
        assert!(error.contains(&format!("{name:?}: expected shape [8, 12], found [8, 11]")), "{error}");
        let without_positions = weights.iter().filter(|(name, _)| !name.ends_with(POSITIONS));
        let without_positions = without_positions.map(|(name, tensor)| (name.to_owned(), tensor.clone()));
        let error = T5Encoder::build(config(), &without_positions.collect::<InMemoryTensors>())
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("\"encoder.block.0.{POSITIONS}\" is missing")), "{error}");
    }

    #[test]
    fn unsupported_configs_are_errors() {
        for (config, expected) in [
            (json!({"feed_forward_proj": "gelu"}), "\"feed_forward_proj\": \"gelu\" is not supported"),
            (json!({"relative_attention_num_buckets": 2}), "\"relative_attention_num_buckets\": expected 4 or more"),
            (json!({"num_heads": 0}), "\"num_heads\": expected at least 1, found 0"),
        ] {
            let error = T5Config::new(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
