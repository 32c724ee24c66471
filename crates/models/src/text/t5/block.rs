//! [`T5Block`]: transformers' `T5Block` in an encoder.

use super::relative_position::RelativePositions;
use super::{T5Activation, T5Config};
use crate::Result;
use crate::layers::TransformerBlock;
use crate::weight_builder::{Linear, WeightBuilder};
use candle_core::Tensor;
use candle_nn::ops::softmax_last_dim;
use clearform_attention::AttentionPlan;
use clearform_ops::{add, gelu, rms_norm};
use clearform_weights::TensorSource;

/// Elements of the scores that are in memory at a time, 16 MiB in f32: those of 16 heads at 512 tokens.
const SCORES_AT_ONCE: usize = 1 << 22;

/// Self-attention, then an MLP, each after an RMS norm and added to its input.
#[derive(Debug)]
pub(super) struct T5Block {
    attention: T5Attention,
    mlp: T5FeedForward,
}

/// What is added to attention scores.
pub(super) struct ScoreBias {
    /// By relative position, (heads, tokens, tokens).
    pub positions: Tensor,
    /// 0 for tokens to attend to and the lowest number for padding, (batch, 1, tokens).
    pub mask: Option<Tensor>,
}

/// transformers' `T5LayerSelfAttention`.
#[derive(Debug)]
struct T5Attention {
    norm: T5LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    heads: usize,
    /// Only in blocks of UMT5 after the first; the others use those of the block before.
    positions: Option<RelativePositions>,
}

/// transformers' `T5LayerFF`. Its MLP is `T5DenseActDense`, or `T5DenseGatedActDense` with two layers up.
#[derive(Debug)]
struct T5FeedForward {
    norm: T5LayerNorm,
    up: Linear,
    /// The layer whose output is multiplied by the activated one (GLU; Shazeer, arXiv 2002.05202).
    gated: Option<Linear>,
    down: Linear,
    activation: T5Activation,
}

/// transformers' `T5LayerNorm`, an RMS norm.
#[derive(Debug)]
pub(super) struct T5LayerNorm {
    weight: Tensor,
    eps: f64,
}

/// The plan of transformers' attention has no say here.
impl TransformerBlock for T5Block {
    type Config = T5Config;

    fn load(config: &T5Config, source: &dyn TensorSource, _: &AttentionPlan, index: usize) -> Result<Self> {
        let layers = WeightBuilder::root(source).pp("encoder.block").pp(index).pp("layer");
        let attention = T5Attention::load(&layers.pp("0"), config, index)?;
        Ok(Self { attention, mlp: T5FeedForward::load(&layers.pp("1"), config)? })
    }
}

impl T5Block {
    /// The block's own relative positions, if it is not the first and has some; they hold for the blocks after it too.
    pub(super) fn positions(&self) -> Option<&RelativePositions> {
        self.attention.positions.as_ref()
    }

    /// # Shapes
    /// x (batch, tokens, width) -> as x.
    pub(super) fn forward(&self, x: &Tensor, bias: &ScoreBias) -> Result<Tensor> {
        self.mlp.forward(&self.attention.forward(x, bias)?)
    }
}

impl T5Attention {
    fn load(builder: &WeightBuilder, config: &T5Config, index: usize) -> Result<Self> {
        let attention = builder.pp("SelfAttention");
        let inner = config.heads * config.head_dim;
        let projection = |name: &str| attention.shaped_linear(name, [inner, config.width]);
        let has_table = index > 0 && attention.has(RelativePositions::TABLE);
        Ok(Self {
            norm: T5LayerNorm::load(&builder.pp("layer_norm"), config)?,
            query: projection("q")?,
            key: projection("k")?,
            value: projection("v")?,
            out: attention.shaped_linear("o", [config.width, inner])?,
            heads: config.heads,
            positions: has_table.then(|| RelativePositions::load(&attention, config)).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, bias: &ScoreBias) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let normed = self.norm.forward(x)?;
        let by_head = |linear: &Linear| -> Result<Tensor> {
            let projected = linear.forward(&normed)?.reshape((batch, tokens, self.heads, ()))?;
            Ok(projected.transpose(1, 2)?.contiguous()?) // (batch, heads, tokens, head_dim)
        };
        let qkv = [by_head(&self.query)?, by_head(&self.key)?, by_head(&self.value)?];
        let samples = (0..batch).map(|sample| self.attend(&qkv, sample, bias)).collect::<Result<Vec<_>>>()?;
        let attended = Tensor::stack(&samples, 0)?.transpose(1, 2)?.flatten_from(2)?; // (batch, tokens, heads · head_dim)
        Ok(add(x, &self.out.forward(&attended)?)?)
    }

    /// softmax(q kᵀ + bias) v of one sample. T5 does not divide the scores by √head_dim.
    ///
    /// # Shapes
    /// Queries, keys and values (batch, heads, tokens, head_dim) -> (heads, tokens, head_dim).
    fn attend(&self, qkv: &[Tensor; 3], sample: usize, bias: &ScoreBias) -> Result<Tensor> {
        let tokens = qkv[0].dim(2)?;
        let mask = bias.mask.as_ref().map(|mask| mask.get(sample)).transpose()?; // (1, tokens)
        let heads_at_once = (SCORES_AT_ONCE / (tokens * tokens)).max(1);
        let mut attended = Vec::new();
        for first in (0..self.heads).step_by(heads_at_once) {
            let count = heads_at_once.min(self.heads - first);
            let some_heads = |x: &Tensor| x.get(sample)?.narrow(0, first, count);
            let [query, key, value] = [some_heads(&qkv[0])?, some_heads(&qkv[1])?, some_heads(&qkv[2])?];
            let mut scores = (query.matmul(&key.t()?)? + bias.positions.narrow(0, first, count)?)?;
            if let Some(mask) = &mask {
                scores = scores.broadcast_add(mask)?;
            }
            attended.push(softmax_last_dim(&scores)?.matmul(&value)?);
        }
        Ok(Tensor::cat(&attended, 0)?)
    }
}

impl T5FeedForward {
    fn load(builder: &WeightBuilder, config: &T5Config) -> Result<Self> {
        let mlp = builder.pp("DenseReluDense");
        let up = |name: &str| mlp.shaped_linear(name, [config.inner_width, config.width]);
        let (name, gated) = if config.feed_forward.gated { ("wi_0", Some(up("wi_1")?)) } else { ("wi", None) };
        Ok(Self {
            norm: T5LayerNorm::load(&builder.pp("layer_norm"), config)?,
            up: up(name)?,
            gated,
            down: mlp.shaped_linear("wo", [config.width, config.inner_width])?,
            activation: config.feed_forward.activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = self.norm.forward(x)?;
        let up = self.up.forward(&normed)?; // (batch, tokens, inner width)
        let mut active = match self.activation {
            T5Activation::Relu => up.relu()?,
            T5Activation::GeluNew => gelu(&up)?,
            T5Activation::Silu => up.silu()?,
        };
        if let Some(gated) = &self.gated {
            active = (active * gated.forward(&normed)?)?;
        }
        Ok(add(x, &self.down.forward(&active)?)?)
    }
}

impl T5LayerNorm {
    pub(super) fn load(builder: &WeightBuilder, config: &T5Config) -> Result<Self> {
        Ok(Self { weight: builder.shaped("weight", &[config.width])?, eps: config.norm_eps })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(x, &self.weight, self.eps)?)
    }
}
